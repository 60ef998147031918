"""One step of decoding on a CPU in one call of `decode.cpp`: for the engine, while no gradient is
wanted.

`Decoder` packs a model's weights once, in the precision they have, and then answers as the model
itself does with a `KVCache`: the newest token of each row in, fp32 logits out. A packed copy costs
the memory of the weights again, or what matrices take as integers (see `quantize`), if they are
given as such: activations then stay bf16.

Shapes: B rows (tokens), A of them that want an answer, V vocabulary.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from llama2 import devices
from llama2.kernels import build
from llama2.model.cache import KVCache
from llama2.model.llama import Llama, rotary_tables
from llama2.model.quantize import GROUP, Rounded
from llama2.model.tensors import EMBEDDINGS, HEAD

_LETTER = {torch.float32: "f", torch.bfloat16: "b"}
_LANES = 16  # outputs of a packed block
_MATRICES = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "self_attn.o_proj",
    "mlp.down_proj",
)
_NORMS = ("input_layernorm", "post_attention_layernorm")
_call = build.Library("decode")


def runs(model: Llama) -> bool:
    """Whether `Decoder` takes this model."""
    weights = list(model.parameters())
    kinds = {weight.dtype for weight in weights}
    return (
        len(kinds) == 1
        and kinds <= _LETTER.keys()
        and all(devices.is_cpu(weight) for weight in weights)
        and model.model.bare
        and _call.found
    )


class Decoder:
    """The packed weights of `model` as they are now.

    integers: its matrices by their names in the state dict, rounded; the head and all of the layers
    in 8 bits, or those of the layers in 4. `model` is then in bf16.
    """

    def __init__(self, model: Llama, integers: Mapping[str, Rounded] | None = None) -> None:
        c = self.config = model.config
        self.kind = model.head_weight.dtype
        weights: dict[str, Tensor | Rounded] = {
            **{name: weight.detach() for name, weight in model.named_parameters()},
            **(integers or {}),
        }
        head = weights[EMBEDDINGS if c.tie_word_embeddings else HEAD]
        self.letter = _LETTER[self.kind]

        if integers:
            self.letter = "i" if isinstance(head, Rounded) else "n"

        self._kept: list[Tensor | None] = [
            model.model.embed_tokens.weight.detach(),
            model.model.norm.weight.detach().float(),
            *self._packed(head),
        ]
        for layer in range(c.num_hidden_layers):
            prefix = f"model.layers.{layer}."
            query, key, value, gate, up, out, down = (
                weights[f"{prefix}{name}.weight"] for name in _MATRICES
            )
            norms = (model.get_parameter(f"{prefix}{name}.weight") for name in _NORMS)
            self._kept += [
                *(norm.detach().float() for norm in norms),
                *self._packed(_joined(query, key, value)),
                *self._packed(out),
                *self._packed(gate, up),
                *self._packed(down),
            ]

        pointers = [None if tensor is None else tensor.data_ptr() for tensor in self._kept]
        self._pointers = (ctypes.c_void_p * len(pointers))(*pointers)
        self._places = torch.arange(64)
        positions = torch.arange(c.max_position_embeddings)[None]
        cos, sin = rotary_tables(positions, c.head_dim, c.rope_theta)
        self._cos, self._sin = (
            table[0, :, 0, c.head_dim // 2 :].contiguous() for table in (cos, sin)
        )

    def __call__(self, tokens_B: Tensor, positions_B: Tensor, cache: KVCache) -> Tensor:
        """logits_BV behind each row's newest token, whose keys and values are added at its
        position. Rows are the first B slots of the cache."""
        rows_B = self._index(len(tokens_B))
        return self._step(tokens_B, rows_B, positions_B, cache, rows_B, apart=True)

    def read(
        self, tokens_B: Tensor, slots_B: Tensor, positions_B: Tensor, last_A: Tensor, cache: KVCache
    ) -> Tensor:
        """Read prompts: each token goes into its slot at its position, and sees all that stands
        before it there. The logits_AV behind the tokens of which `last_A` are the places."""
        return self._step(tokens_B, slots_B, positions_B, cache, last_A, apart=False)

    def _step(
        self,
        tokens_B: Tensor,
        slots_B: Tensor,
        positions_B: Tensor,
        cache: KVCache,
        answers_A: Tensor,
        apart: bool,
    ) -> Tensor:
        c = self.config
        logits_AV = torch.empty(len(answers_A), c.vocab_size)
        numbers = (ctypes.c_int64 * 12)(
            c.num_hidden_layers,
            c.hidden_size,
            c.intermediate_size,
            c.num_attention_heads,
            c.num_key_value_heads,
            c.head_dim,
            c.vocab_size,
            len(tokens_B),
            cache.slots,
            cache.capacity,
            len(answers_A),
            apart,
        )
        _call(
            f"decode_{self.letter}",
            ctypes.addressof(numbers),
            float(c.rms_norm_eps),
            ctypes.addressof(self._pointers),
            tokens_B.contiguous(),
            slots_B,
            positions_B.contiguous(),
            self._cos,
            self._sin,
            cache.data_LPNCKD,
            answers_A,
            logits_AV,
        )

        return logits_AV

    def _index(self, count: int) -> Tensor:
        if len(self._places) < count:
            self._places = torch.arange(2 * count)

        return self._places[:count]

    def _packed(self, *matrices: Tensor | Rounded) -> tuple[Tensor, Tensor | None]:
        """Matrices of one shape, their blocks of outputs by turns; and the scales of 8-bit
        integers."""
        numbers = [
            matrix.integers_OI if isinstance(matrix, Rounded) else matrix for matrix in matrices
        ]
        outputs, inputs = numbers[0].shape
        blocks, step = -(-outputs // _LANES), -(-inputs // 32) * 32
        letter = "i" if numbers[0].dtype == torch.int8 else _LETTER[self.kind]
        packed = torch.empty(blocks * len(matrices), step * _LANES, dtype=numbers[0].dtype)

        for offset, matrix in enumerate(numbers):
            _call(
                f"pack_{letter}",
                outputs,
                inputs,
                matrix.contiguous(),
                len(matrices),
                offset,
                packed,
            )

        whole = [matrix for matrix in matrices if isinstance(matrix, Rounded)]
        if not whole:
            return packed, None

        scales = _lanes([matrix.scales_OG for matrix in whole])
        zeros = [matrix.zeros_OG for matrix in whole if matrix.zeros_OG is not None]
        return (_nibbles(packed, scales, _lanes(zeros)), None) if zeros else (packed, scales)


def _joined(*matrices: Tensor | Rounded) -> Tensor | Rounded:
    """Matrices of the same inputs as one."""
    whole = [matrix for matrix in matrices if isinstance(matrix, Rounded)]
    if not whole:
        return torch.cat([matrix for matrix in matrices if isinstance(matrix, Tensor)])

    zeros = [matrix.zeros_OG for matrix in whole if matrix.zeros_OG is not None]
    return Rounded(
        torch.cat([matrix.integers_OI for matrix in whole]),
        torch.cat([each.scales_OG for each in whole]),
        torch.cat(zeros) if zeros else None,
        whole[0].inputs,
    )


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
    of decode.cpp."""
    pairs = (packed.view(*scales.shape[:2], GROUP // 2 * _LANES, 2) + 8).to(torch.uint8)
    return torch.cat(
        [
            scales.bfloat16().view(torch.uint8),
            (zeros + 8).to(torch.uint8),
            pairs[..., 0] | pairs[..., 1] << 4,
        ],
        -1,
    )
