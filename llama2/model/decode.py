"""One decoding step on a CPU in one call of `decode.cpp`: for the engine, while no gradient is wanted.

`Decoder` packs a model's weights once, in the precision they have, and then answers as the model itself does with a
`KVCache`: the newest token of each row in, fp32 logits out. A packed copy costs the memory of the weights again.

Shapes: B rows, V vocabulary.
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


class Decoder:
    """The packed weights of `model` as they are now."""

    def __init__(self, model: Llama) -> None:
        c = self.config = model.config
        self.kind = model.head_weight.dtype
        self._kept: list[Tensor] = [model.model.embed_tokens.weight.detach(), self._packed(model.head_weight),
                                    model.model.norm.weight.detach().float()]
        for layer in model.model.layers:
            assert isinstance(layer, Layer)
            attention, mlp = layer.self_attn, layer.mlp
            qkv = torch.cat([part.weight for part in (attention.q_proj, attention.k_proj, attention.v_proj)])
            self._kept += [layer.input_layernorm.weight.detach().float(),
                           layer.post_attention_layernorm.weight.detach().float(), self._packed(qkv),
                           self._packed(attention.o_proj.weight),
                           self._packed(mlp.gate_proj.weight, mlp.up_proj.weight), self._packed(mlp.down_proj.weight)]
        self._pointers = (ctypes.c_void_p * len(self._kept))(*[tensor.data_ptr() for tensor in self._kept])
        positions = torch.arange(c.max_position_embeddings)[None]
        cos, sin = rotary_tables(positions, c.head_dim, c.rope_theta)
        self._cos, self._sin = (table[0, :, 0, c.head_dim // 2 :].contiguous() for table in (cos, sin))

    def __call__(self, tokens_B: Tensor, positions_B: Tensor, cache: KVCache) -> Tensor:
        """logits_BV behind each row's newest token, whose keys and values are added at its position. Rows are the
        first B slots of the cache."""
        c, rows = self.config, len(tokens_B)
        logits_BV = torch.empty(rows, c.vocab_size)
        numbers = (ctypes.c_int64 * 10)(c.num_hidden_layers, c.hidden_size, c.intermediate_size, c.num_attention_heads,
                                        c.num_key_value_heads, c.head_dim, c.vocab_size, rows, cache.slots,
                                        cache.capacity)
        _call(f"decode_{_LETTER[self.kind]}", ctypes.addressof(numbers), float(c.rms_norm_eps),
              ctypes.addressof(self._pointers), tokens_B.contiguous(), positions_B.contiguous(), self._cos, self._sin,
              cache.data_LPNCKD, logits_BV)
        return logits_BV

    def _packed(self, *matrices: Tensor) -> Tensor:
        """Matrices of one shape, their blocks of outputs by turns."""
        outputs, inputs = matrices[0].shape
        blocks, step = -(-outputs // _LANES) * len(matrices), -(-inputs // 32) * 32
        packed = torch.empty(blocks, step * _LANES, dtype=self.kind)
        for offset, matrix in enumerate(matrices):
            _call(f"pack_{_LETTER[self.kind]}", outputs, inputs, matrix.detach().contiguous(), len(matrices), offset,
                  packed)
        return packed
