"""One step of decoding on a CPU in one call of `decode.cpp`: for the engine, while no gradient is wanted.

`Decoder` packs a model's weights once, in the precision they have, and then answers as the model itself does with a
`KVCache`: the newest token of each row in, fp32 logits out. A packed copy costs the memory of the weights again, or
half of it as 8-bit integers: then each output has a scale of its own, and activations stay bf16.

Shapes: B rows (tokens), A of them that want an answer, V vocabulary.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from llama2.model import native
from llama2.model.cache import KVCache
from llama2.model.llama import Layer, Llama, rotary_tables

_LETTER = {torch.float32: "f", torch.bfloat16: "b"}
_LANES = 16  # outputs of a packed block
_call = native.Library("decode")


def runs(model: Llama) -> bool:
    """Whether `Decoder` takes this model."""
    weights = list(model.parameters())
    kinds = {weight.dtype for weight in weights}
    return (len(kinds) == 1 and kinds <= _LETTER.keys() and all(weight.device.type == "cpu" for weight in weights)
            and _call.found)


def rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """8-bit integers and the scale of each output: weight ≈ integers · scale, off by at most half a scale."""
    scale = (weight.float().abs().amax(1) / 127).clamp(min=1e-12)
    return (weight.float() / scale[:, None]).round().clamp(-127, 127).to(torch.int8), scale


class Decoder:
    """The packed weights of `model` as they are now; with `integers` in 8 bits (the model's own must be bf16)."""

    def __init__(self, model: Llama, *, integers: bool = False) -> None:
        c = self.config = model.config
        self.kind, self.letter = model.head_weight.dtype, "i" if integers else _LETTER[model.head_weight.dtype]
        self._kept: list[Tensor | None] = [model.model.embed_tokens.weight.detach(),
                                           model.model.norm.weight.detach().float(), *self._packed(model.head_weight)]
        for layer in model.model.layers:
            assert isinstance(layer, Layer)
            attention, mlp = layer.self_attn, layer.mlp
            qkv = torch.cat([part.weight for part in (attention.q_proj, attention.k_proj, attention.v_proj)])
            self._kept += [layer.input_layernorm.weight.detach().float(),
                           layer.post_attention_layernorm.weight.detach().float(), *self._packed(qkv),
                           *self._packed(attention.o_proj.weight),
                           *self._packed(mlp.gate_proj.weight, mlp.up_proj.weight),
                           *self._packed(mlp.down_proj.weight)]
        pointers = [None if tensor is None else tensor.data_ptr() for tensor in self._kept]
        self._pointers = (ctypes.c_void_p * len(pointers))(*pointers)
        self._places = torch.arange(64)
        positions = torch.arange(c.max_position_embeddings)[None]
        cos, sin = rotary_tables(positions, c.head_dim, c.rope_theta)
        self._cos, self._sin = (table[0, :, 0, c.head_dim // 2 :].contiguous() for table in (cos, sin))

    def __call__(self, tokens_B: Tensor, positions_B: Tensor, cache: KVCache) -> Tensor:
        """logits_BV behind each row's newest token, whose keys and values are added at its position. Rows are the
        first B slots of the cache."""
        rows_B = self._index(len(tokens_B))
        return self._step(tokens_B, rows_B, positions_B, cache, rows_B, apart=True)

    def read(self, tokens_B: Tensor, slots_B: Tensor, positions_B: Tensor, last_A: Tensor, cache: KVCache) -> Tensor:
        """Read prompts: each token goes into its slot at its position, and sees all that stands before it there. The
        logits_AV behind the tokens of which `last_A` are the places."""
        return self._step(tokens_B, slots_B, positions_B, cache, last_A, apart=False)

    def _step(self, tokens_B: Tensor, slots_B: Tensor, positions_B: Tensor, cache: KVCache, answers_A: Tensor,
              apart: bool) -> Tensor:
        c = self.config
        logits_AV = torch.empty(len(answers_A), c.vocab_size)
        numbers = (ctypes.c_int64 * 12)(c.num_hidden_layers, c.hidden_size, c.intermediate_size, c.num_attention_heads,
                                        c.num_key_value_heads, c.head_dim, c.vocab_size, len(tokens_B), cache.slots,
                                        cache.capacity, len(answers_A), apart)
        _call(f"decode_{self.letter}", ctypes.addressof(numbers), float(c.rms_norm_eps),
              ctypes.addressof(self._pointers), tokens_B.contiguous(), slots_B, positions_B.contiguous(), self._cos,
              self._sin, cache.data_LPNCKD, answers_A, logits_AV)
        return logits_AV

    def _index(self, count: int) -> Tensor:
        if len(self._places) < count:
            self._places = torch.arange(2 * count)
        return self._places[:count]

    def _packed(self, *matrices: Tensor) -> tuple[Tensor, Tensor | None]:
        """Matrices of one shape, their blocks of outputs by turns; and the scales of integers."""
        outputs, inputs = matrices[0].shape
        blocks, step = -(-outputs // _LANES), -(-inputs // 32) * 32
        kind = torch.int8 if self.letter == "i" else self.kind
        packed = torch.empty(blocks * len(matrices), step * _LANES, dtype=kind)
        scales = torch.ones(blocks, len(matrices), _LANES) if self.letter == "i" else None
        for offset, matrix in enumerate(matrices):
            matrix = matrix.detach()
            if scales is not None:
                matrix, scale = rounded(matrix)
                scales[:, offset] = torch.nn.functional.pad(scale, (0, blocks * _LANES - outputs)).view(blocks, _LANES)
            _call(f"pack_{self.letter}", outputs, inputs, matrix.contiguous(), len(matrices), offset, packed)
        return packed, scales
