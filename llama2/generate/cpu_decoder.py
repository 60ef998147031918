"""One step of decoding on a CPU in one call of `decode.cpp`: for the engine, while no gradient is
wanted.

`CpuDecoder` packs a model's weights once, in the precision they have, and then answers as the model
itself does with a `KVCache`: the newest token of each row in, fp32 logits out. A packed copy costs
the memory of the weights again, or what matrices take as integers (see `quantize`), if they are
given as such: activations then stay bf16.

Shapes: B rows (tokens), A of them that want an answer, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from ctypes import addressof, c_float, c_int64, c_void_p

import torch
import torch.nn.functional as F
from torch import Tensor

from llama2 import devices
from llama2.kernels import build, is_known, shapes
from llama2.model.cache import KVCache
from llama2.model.llama import Llama
from llama2.model.positions import rotary_tables
from llama2.model.quantize import GROUP, QuantizedWeight
from llama2.model.tensors import EMBEDDINGS, HEAD

_KINDS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.int8: "int8"}
_LANES = 16  # outputs of a packed block
Weight = Tensor | QuantizedWeight


class PackedMatrix(build.Struct):
    """See step.h, as for the others."""

    _fields_ = build.fields(c_void_p, "packed", "scales")


class LayerWeights(build.Struct):
    """Pointers to the weights of a layer."""

    _fields_ = [
        *build.fields(c_void_p, "attention_norm", "mlp_norm"),
        *build.fields(PackedMatrix, "qkv", "output", "gate_up", "down"),
    ]


class Model(build.Struct):
    """Sizes of a model, and pointers to its weights."""

    _fields_ = [
        *build.fields(c_int64, "layers", "hidden", "feed_forward", "heads", "kv_heads"),
        *build.fields(c_int64, "head_dim", "vocabulary"),
        *build.fields(c_void_p, "embedding", "last_norm", "cos", "sin", "weights"),
        ("head", PackedMatrix),
        ("eps", c_float),
    ]


class Step(build.Struct):
    """All that one step reads and writes."""

    _fields_ = [
        ("model", c_void_p),
        *build.fields(c_int64, "rows", "distinct_slots"),
        *build.fields(c_void_p, "tokens", "token_slots", "positions"),
        *build.fields(c_int64, "slots", "columns"),
        ("cache", c_void_p),
        ("answers", c_int64),
        *build.fields(c_void_p, "answer_rows", "logits"),
    ]


_call = build.Library("decode", Model, Step, LayerWeights)


def supports(model: Llama) -> bool:
    """Tell whether `CpuDecoder` takes this model, whose weights must say all that it does."""
    weights = list(model.parameters())
    kind = weights[0].dtype
    return (
        kind in (torch.float32, torch.bfloat16)
        and shapes.takes_decoding(model.config)
        and all(weight.dtype == kind and devices.is_cpu(weight) for weight in weights)
        and is_known(model)
        and _call.is_built
    )


class CpuDecoder:
    """The packed weights of `model` as they are now.

    integers: its matrices by their names in the state dict, quantized; the head and all of the
    layers in 8 bits, or those of the layers in 4. `model` is then in bf16.
    """

    def __init__(self, model: Llama, integers: Mapping[str, QuantizedWeight] | None = None) -> None:
        c, weights = model.config, dict[str, Weight](integers or {})
        for name, weight in model.named_parameters():
            weights.setdefault(name, weight.detach())

        self._kind = _KINDS[model.head_weight.dtype]
        head = weights[EMBEDDINGS if c.tie_word_embeddings else HEAD]
        if integers:
            self._kind = "int8" if isinstance(head, QuantizedWeight) else "int4"

        self._rows = torch.arange(64)
        # the structs hold the tensors that they point to
        self._layers = [_layer(model, weights, layer) for layer in range(c.num_hidden_layers)]
        self._array = (LayerWeights * len(self._layers))(*self._layers)
        positions, half = torch.arange(c.max_position_embeddings)[None], c.head_dim // 2
        cos, sin = rotary_tables(positions, c.head_dim, c.rope_theta, c.rope_scaling)
        self._model = Model(
            layers=c.num_hidden_layers,
            hidden=c.hidden_size,
            feed_forward=c.intermediate_size,
            heads=c.num_attention_heads,
            kv_heads=c.num_key_value_heads,
            head_dim=c.head_dim,
            vocabulary=c.vocab_size,
            embedding=model.model.embed_tokens.weight.detach(),
            last_norm=model.model.norm.weight.detach().float(),
            cos=cos[0, :, 0, half:].contiguous(),
            sin=sin[0, :, 0, half:].contiguous(),
            weights=addressof(self._array),
            head=_pack(head),
            eps=c.rms_norm_eps,
        )

    def __call__(self, tokens_B: Tensor, positions_B: Tensor, cache: KVCache) -> Tensor:
        """Return logits_BV behind each row's newest token, whose keys and values are added at its
        position. Rows are the first B slots of the cache."""
        if len(self._rows) < len(tokens_B):
            self._rows = torch.arange(2 * len(tokens_B))

        rows_B = self._rows[: len(tokens_B)]
        return self._step(tokens_B, rows_B, positions_B, cache, rows_B, distinct_slots=True)

    def read(
        self, tokens_B: Tensor, slots_B: Tensor, positions_B: Tensor, last_A: Tensor, cache: KVCache
    ) -> Tensor:
        """Read prompts: each token goes into its slot at its position, and sees all that stands
        before it there. Return logits_AV behind the tokens that `last_A` numbers."""
        return self._step(tokens_B, slots_B, positions_B, cache, last_A, distinct_slots=False)

    def _step(
        self,
        tokens_B: Tensor,
        slots_B: Tensor,
        positions_B: Tensor,
        cache: KVCache,
        answers_A: Tensor,
        distinct_slots: bool,
    ) -> Tensor:
        logits_AV = torch.empty(len(answers_A), self._model.values["vocabulary"])
        step = Step(
            model=addressof(self._model),
            rows=len(tokens_B),
            distinct_slots=distinct_slots,
            tokens=tokens_B.contiguous(),
            token_slots=slots_B,
            positions=positions_B.contiguous(),
            slots=cache.slots,
            columns=cache.capacity,
            cache=cache.data_LPNCKD,
            answers=len(answers_A),
            answer_rows=answers_A,
            logits=logits_AV,
        )
        _call(f"decode_{self._kind}", step)
        return logits_AV


def _layer(model: Llama, weights: Mapping[str, Weight], layer: int) -> LayerWeights:
    prefix = f"model.layers.{layer}"
    q, k, v, output = (weights[f"{prefix}.self_attn.{part}_proj.weight"] for part in "qkvo")
    gate, up, down = (
        weights[f"{prefix}.mlp.{part}_proj.weight"] for part in ("gate", "up", "down")
    )
    norms = [
        model.get_parameter(f"{prefix}.{part}_layernorm.weight").detach().float()
        for part in ("input", "post_attention")
    ]
    return LayerWeights(
        attention_norm=norms[0],
        mlp_norm=norms[1],
        qkv=_pack(_join([q, k, v])),
        output=_pack(output),
        gate_up=_pack(gate, up),
        down=_pack(down),
    )


def _pack(*matrices: Weight) -> PackedMatrix:
    """Matrices of one shape, their blocks of outputs by turns; and the scales of 8-bit
    integers."""
    quantized = [matrix for matrix in matrices if isinstance(matrix, QuantizedWeight)]
    numbers = [matrix if isinstance(matrix, Tensor) else matrix.integers_OI for matrix in matrices]
    outputs, inputs = numbers[0].shape
    blocks, step = -(-outputs // _LANES), -(-inputs // 32) * 32
    packed = torch.empty(blocks * len(matrices), step * _LANES, dtype=numbers[0].dtype)
    for offset, matrix in enumerate(numbers):
        shape = (outputs, inputs, matrix.contiguous(), len(matrices), offset)
        _call(f"pack_{_KINDS[packed.dtype]}", *shape, packed)

    if not quantized:
        return PackedMatrix(packed=packed)

    scales = _lanes([matrix.scales_OG for matrix in quantized])
    zeros = [matrix.zeros_OG for matrix in quantized if matrix.zeros_OG is not None]
    if zeros:
        return PackedMatrix(packed=_nibbles(packed, scales, _lanes(zeros)))

    return PackedMatrix(packed=packed, scales=scales)


def _join(matrices: list[Weight]) -> Weight:
    """Matrices of the same inputs as one."""
    quantized = [matrix for matrix in matrices if isinstance(matrix, QuantizedWeight)]
    if not quantized:
        return torch.cat([matrix for matrix in matrices if isinstance(matrix, Tensor)])

    integers_OI = torch.cat([matrix.integers_OI for matrix in quantized])
    scales_OG = torch.cat([matrix.scales_OG for matrix in quantized])
    zeros = [matrix.zeros_OG for matrix in quantized if matrix.zeros_OG is not None]
    zeros_OG = torch.cat(zeros) if zeros else None
    return QuantizedWeight(integers_OI, scales_OG, zeros_OG, quantized[0].inputs)


def _lanes(tables_OG: list[Tensor]) -> Tensor:
    """Numbers of each output and group as blocks read them: [blocks, G, 16], the blocks of several
    tables by turns."""
    blocks = [
        F.pad(table, (0, 0, 0, -len(table) % _LANES)).view(-1, _LANES, table.shape[1])
        for table in tables_OG
    ]
    return torch.stack(blocks, 1).flatten(0, 1).transpose(1, 2).contiguous()


def _nibbles(packed: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """Packed integers -8..7 as bytes of two, behind the scales and zeros of their group: `Nibbles`
    of products.h."""
    pairs = (packed.view(*scales.shape[:2], GROUP // 2 * _LANES, 2) + 8).to(torch.uint8)
    scale_bytes, zero_bytes = scales.bfloat16().view(torch.uint8), (zeros + 8).to(torch.uint8)
    return torch.cat([scale_bytes, zero_bytes, pairs[..., 0] | pairs[..., 1] << 4], -1)
