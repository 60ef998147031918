"""The Llama 2 network (§2.2, table 1): pre-normalised decoder with RMSNorm, SwiGLU, rotary
positions and GQA; and what its relatives vary: the size of a head, scaled rotary positions, biases
in attention.

Module names are those of Hugging Face's `LlamaForCausalLM`, so a state dict is a checkpoint, and
rotary positions use its convention (the two halves of each head are paired). Norms, rotary tables,
softmax and logits are computed in fp32 whatever the precision of the products. The file knows
nothing of ranks; parallelism is applied from outside.

Shapes: B rows, T query positions, S key positions, D hidden, V vocabulary, H query heads, K
key/value heads, G = H / K query heads that share one key head, E head dimension.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llama2 import devices
from llama2.model import attention
from llama2.model.attention import (
    document_attention,
    documents_of,
    explicit_attention,
    sdpa_attention,
)
from llama2.model.config import LlamaConfig
from llama2.model.likelihood import Likelihood, of_logits
from llama2.model.linear import Embedding, Linear, is_bare
from llama2.model.positions import (
    causal,
    positions_along,
    positions_within,
    rotary_tables,
    rotate,
    same_branch,
    same_document,
)

__all__ = [
    "EXPLICIT_LENGTH",
    "INITIAL_STD",
    "Attend",
    "Attention",
    "Cache",
    "Context",
    "FeedForward",
    "Layer",
    "Llama",
    "LlamaConfig",
    "RMSNorm",
    "Trunk",
    "dtype_of_products",
    "initialise",
]
INITIAL_STD = 0.02
# on a CPU, up to this many queries, products and softmax beat PyTorch's fused kernel in training
EXPLICIT_LENGTH = 512


class Cache(Protocol):
    """Keys and values of earlier positions, as attention sees them."""

    # True where a query may look; None: the keys are the queries' own, causal
    mask_BTS: Tensor | None

    def update(self, layer: int, keys_BKTE: Tensor, values_BKTE: Tensor) -> tuple[Tensor, Tensor]:
        """Append rotated keys and values of one layer; return all keys_BKSE and values_BKSE."""
        ...


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(q_BHTE, k_BKSE, v_BKSE) -> out_BHTE, under the mask of one forward pass"""


@dataclass(frozen=True)
class Context:
    """Tables and mask that all layers of one forward pass share."""

    cos_BT1E: Tensor  # fp32; B is 1 if all rows have the same positions
    sin_BT1E: Tensor  # negative in the first half
    attend: Attend
    cache: Cache | None


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight, in fp32; the result has the precision of the products that
    follow.

    It reads the residual stream, so it also adds a block's output to the stream: one pass over
    memory does for both.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x_BTD: Tensor, update_BTD: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the stream x + update (x without one), and its norm."""
        if update_BTD is not None:
            x_BTD = x_BTD + update_BTD

        x32_BTD = x_BTD.float()
        scale_BT1 = torch.rsqrt(x32_BTD.square().mean(-1, keepdim=True) + self.eps)
        normed_BTD = x32_BTD * scale_BT1 * self.weight

        return x_BTD, normed_BTD.to(dtype_of_products(x_BTD))


class Attention(nn.Module):
    """Causal self-attention; each of K key heads serves G query heads (§2.2: grouped-query
    attention)."""

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        dim, bias = config.hidden_size, config.attention_bias
        self.q_proj = Linear(dim, config.query_size, bias)
        self.k_proj = Linear(dim, config.key_size, bias)
        self.v_proj = Linear(dim, config.key_size, bias)
        self.o_proj = Linear(config.query_size, dim, config.attention_output_bias)

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        """Return what each position reads at those it may look at, [B, T, D]."""
        rows, length, _ = x_BTD.shape
        heads = (rows, length, -1, self.head_dim)
        q_BTHE, k_BTKE = self.q_proj(x_BTD).view(heads), self.k_proj(x_BTD).view(heads)
        q_BTHE, k_BTKE = self.rotate(q_BTHE, k_BTKE, context)
        v_BTKE = self.v_proj(x_BTD).view(heads)

        k_BKSE, v_BKSE = k_BTKE.transpose(1, 2), v_BTKE.transpose(1, 2)
        if context.cache is not None:
            k_BKSE, v_BKSE = context.cache.update(self.layer, k_BKSE, v_BKSE)

        out_BHTE = context.attend(q_BTHE.transpose(1, 2), k_BKSE, v_BKSE)
        joined_BTD: Tensor = self.o_proj(out_BHTE.transpose(1, 2).reshape(rows, length, -1))
        return joined_BTD

    def rotate(self, q_BTHE: Tensor, k_BTKE: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """Rotate queries and keys by their positions."""
        table = context.cos_BT1E, context.sin_BT1E
        return rotate(q_BTHE, *table), rotate(k_BTKE, *table)


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) · up(x))."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        """Return [B, T, D]. Both blocks of a layer are called alike; this one has no use for
        `context`."""
        out_BTD: Tensor = self.down_proj(F.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))
        return out_BTD


class Layer(nn.Module):
    """Attention and feed-forward, each behind a norm and beside the residual stream."""

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = FeedForward(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x_BTD: Tensor, update_BTD: Tensor | None, context: Context
    ) -> tuple[Tensor, Tensor]:
        """Take and return the stream, and what is still to be added to it: the output of the last
        feed-forward."""
        x_BTD, normed_BTD = self.input_layernorm(x_BTD, update_BTD)
        attended_BTD = self.self_attn(normed_BTD, context)
        x_BTD, normed_BTD = self.post_attention_layernorm(x_BTD, attended_BTD)
        return x_BTD, self.mlp(normed_BTD, context)


class Trunk(nn.Module):
    """Embeddings, layers and the last norm: all of the model but its head. Hugging Face calls it
    `model`."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        # recompute each layer in the backward pass instead of keeping it
        self.gradient_checkpointing = False
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            Layer(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        tokens_BT: Tensor,
        documents_BT: Tensor | None = None,
        positions_BT: Tensor | None = None,
        cache: Cache | None = None,
        branches_BT: Tensor | None = None,
    ) -> Tensor:
        """Return the normed hidden states of the last layer, [B, T, D]. branches_BT: 0 for a
        prompt, 1, 2, ... for answers behind it (see `positions`)."""
        x_BTD = self.embed_tokens(tokens_BT)
        context = self.context(x_BTD, documents_BT, positions_BT, cache, branches_BT)
        update_BTD = None

        for layer in self.layers:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x_BTD, update_BTD = checkpoint(
                    layer, x_BTD, update_BTD, context, use_reentrant=False
                )
            else:
                x_BTD, update_BTD = layer(x_BTD, update_BTD, context)

        hidden_BTD: Tensor = self.norm(x_BTD, update_BTD)[1]
        return hidden_BTD

    def context(
        self,
        x_BTD: Tensor,
        documents_BT: Tensor | None = None,
        positions_BT: Tensor | None = None,
        cache: Cache | None = None,
        branches_BT: Tensor | None = None,
    ) -> Context:
        """Make rotary tables and mask once for all layers."""
        if branches_BT is not None:
            positions_BT = positions_along(branches_BT)
        elif positions_BT is None and documents_BT is not None:
            positions_BT = positions_within(documents_BT)
        elif positions_BT is None:
            positions_BT = torch.arange(x_BTD.shape[1], device=x_BTD.device)[None]

        shape = self.config
        cos_BT1E, sin_BT1E = rotary_tables(
            positions_BT, shape.head_dim, shape.rope_theta, shape.rope_scaling
        )
        return Context(
            cos_BT1E, sin_BT1E, self.attention(x_BTD, documents_BT, cache, branches_BT), cache
        )

    def attention(
        self,
        x_BTD: Tensor,
        documents_BT: Tensor | None,
        cache: Cache | None,
        branches_BT: Tensor | None = None,
    ) -> Attend:
        """Choose how the layers of this pass attend, with the mask that it needs."""
        kind, length, device = dtype_of_products(x_BTD), x_BTD.shape[1], x_BTD.device
        if documents_BT is not None and device.type in attention.DEVICES:
            documents = documents_of(documents_BT, kind, self.config.head_dim)
            if documents is not None:
                return partial(document_attention, documents=documents)

        # With a cache there is no backward pass. (Not a matter of gradient mode: PPO's ratios must
        # begin at exactly 1.)
        explicit = devices.is_cpu(device) and cache is None and length <= EXPLICIT_LENGTH
        mask_BTS = None
        if branches_BT is not None:
            mask_BTS = same_branch(branches_BT)
        elif documents_BT is not None:
            mask_BTS = same_document(documents_BT)
        elif cache is not None:
            mask_BTS = cache.mask_BTS
        elif explicit:
            mask_BTS = causal(length, device)[None]

        bias_B1TS = None
        if mask_BTS is not None:
            # The least finite number, not -inf: a row that sees nothing (an idle cache slot) must
            # not become NaN.
            bias_BTS = torch.zeros(mask_BTS.shape, dtype=kind, device=device)
            bias_B1TS = bias_BTS.masked_fill(~mask_BTS, torch.finfo(kind).min)[:, None]

        return partial(explicit_attention if explicit else sdpa_attention, bias_B1TS=bias_B1TS)


class Llama(nn.Module):
    """The language model. On construction its weights are drawn from `seed` (see `initialise`)."""

    def __init__(self, config: LlamaConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        self.lm_head = (
            None if config.tie_word_embeddings else Linear(config.hidden_size, config.vocab_size)
        )
        self.likelihood = Likelihood()
        initialise(self, seed)

    @property
    def device(self) -> torch.device:
        """The device that holds the weights."""
        return next(self.parameters()).device

    @property
    def head_weight(self) -> Tensor:
        """The output matrix [V, D]; the embeddings' own if they are tied."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """Return the logits [..., V] in fp32 of final hidden states (`forward` with head=False)."""
        if self.lm_head is None:
            return F.linear(hidden_BTD, self.model.embed_tokens.weight).float()

        logits_BTV: Tensor = self.lm_head(hidden_BTD)
        return logits_BTV.float()

    def forward(
        self,
        tokens_BT: Tensor,
        *,
        documents_BT: Tensor | None = None,
        positions_BT: Tensor | None = None,
        cache: Cache | None = None,
        targets_BT: Tensor | None = None,
        entropy: bool = False,
        head: bool = True,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return logits [B, T, V] in fp32; with head=False the final normed hidden states
        [B, T, D]; with targets their log-probabilities [B, T] in fp32 (see `Likelihood`), and with
        entropy=True a pair: these and the entropy [B, T] of each predicted distribution in nats,
        which carries no gradient.

        documents_BT: the document of each packed token: attention stays inside a document, and
        positions restart. Right-padded rows need no mask, since attention is causal. With a cache,
        positions_BT must be given.
        """
        hidden_BTD = self.model(tokens_BT, documents_BT, positions_BT, cache)
        if targets_BT is None:
            return self.logits(hidden_BTD) if head else hidden_BTD

        if self.lm_head is None or is_bare(self.lm_head):
            weight_VD = self.head_weight.to(hidden_BTD.dtype)
            logp_BT, entropy_BT = self.likelihood(hidden_BTD, weight_VD, targets_BT, entropy)
        else:
            logp_BT, entropy_BT = of_logits(self.logits(hidden_BTD), targets_BT)

        return (logp_BT, entropy_BT) if entropy else logp_BT


def initialise(model: nn.Module, seed: int) -> None:
    """Draw all weights: normal with deviation 0.02, the two projections that write to the residual
    stream with 0.02 / sqrt(2 · layers) so that its variance does not grow with depth; norms are
    one, biases zero.

    The paper does not state its initialisation. A model on the meta device is left alone.
    """
    generator = torch.Generator().manual_seed(seed)
    layers = sum(isinstance(module, Layer) for module in model.modules())
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            continue

        with torch.no_grad():
            if parameter.dim() == 1:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            else:
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                std = INITIAL_STD / math.sqrt(2 * layers) if residual else INITIAL_STD
                parameter.copy_(torch.empty(parameter.shape).normal_(0.0, std, generator=generator))


def dtype_of_products(x: Tensor) -> torch.dtype:
    """The precision in which products run: autocast's where it is on, else that of the
    activations."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
