"""The Llama 2 network (§2.2, table 1): pre-normalised decoder with RMSNorm, SwiGLU, rotary
positions and GQA.

Module names are those of Hugging Face's `LlamaForCausalLM`, so a state dict is a checkpoint, and
rotary positions use its convention (the two halves of each head are paired). Norms, rotary tables,
softmax and logits are computed in fp32 whatever the precision of the products. The file knows
nothing of ranks; parallelism is applied from outside.

Shapes: B rows, T query positions, S key positions, D hidden, V vocabulary, H query heads, K
key/value heads, G = H / K query heads that share one key head, E head dimension.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llama2 import devices
from llama2.errors import UserError
from llama2.kernels import fused
from llama2.model import attention
from llama2.model.attention import (
    Documents,
    document_attention,
    documents_of,
    explicit_attention,
    fused_attention,
)
from llama2.model.likelihood import log_likelihood, log_likelihood_and_entropy

INITIAL_STD = 0.02
MOST, MOST_LAYERS = 1 << 26, 1 << 10  # a damaged file must not make us describe a model without end
# beyond, fp32 has no rotary tables and no norms that mean anything
ROPE_THETA, NORM_EPS = (1.0, 1e15), (1e-30, 1.0)
# on a CPU, up to this many queries, products and softmax beat PyTorch's fused kernel in training
EXPLICIT_LENGTH = 512


@dataclass(frozen=True)
class LlamaConfig:
    """The shape of a model; names are those of Hugging Face's config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False
    bos_token_id: int = 1
    eos_token_id: int | tuple[int, ...] = 2
    """one id, or several of which each ends an answer"""

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "max_position_embeddings",
        ):
            most = MOST_LAYERS if name == "num_hidden_layers" else MOST
            if not 1 <= getattr(self, name) <= most:
                raise UserError(
                    f"{name} is {getattr(self, name)}", f"it must be at least 1 and at most {most}"
                )

        if self.hidden_size % (2 * self.num_attention_heads):
            raise UserError(
                f"hidden_size {self.hidden_size} does not divide into {self.num_attention_heads} heads of "
                "an even size",
                "rotary positions pair the dimensions of a head",
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of num_key_value_heads "
                f"{self.num_key_value_heads}",
                "each key head serves the same number of query heads",
            )

        self._check_constants()

    def _check_constants(self) -> None:
        for name, (least, most) in (("rope_theta", ROPE_THETA), ("rms_norm_eps", NORM_EPS)):
            if not least <= getattr(self, name) <= most:
                raise UserError(
                    f"{name} is {getattr(self, name)}",
                    f"it must be at least {least:g} and at most {most:g}",
                )

        ids = self.stops
        if not ids:
            raise UserError("eos_token_id is empty", "name an id that ends an answer")

        for name, token in (
            ("bos_token_id", self.bos_token_id),
            *(("eos_token_id", token) for token in ids),
        ):
            if not 0 <= token < self.vocab_size:
                raise UserError(
                    f"{name} is {token}",
                    f"it must be an id of the vocabulary, at least 0 and below "
                    f"vocab_size {self.vocab_size}",
                )

        # one way to say one thing
        object.__setattr__(self, "eos_token_id", ids[0] if len(ids) == 1 else ids)

    @property
    def stops(self) -> tuple[int, ...]:
        """Every id that ends an answer, each once, the first the one that is `eos_token_id` where
        there is one."""
        listed = (self.eos_token_id,) if isinstance(self.eos_token_id, int) else self.eos_token_id
        return tuple(dict.fromkeys(listed))

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    def parameters(self) -> int:
        """The exact number of parameters of a language model of this shape (tied embeddings count
        once)."""
        dim, kv = self.hidden_size, self.num_key_value_heads * self.head_dim
        layer = 2 * dim * dim + 2 * dim * kv + 3 * dim * self.intermediate_size + 2 * dim
        embeddings = self.vocab_size * dim * (1 if self.tie_word_embeddings else 2)

        return embeddings + self.num_hidden_layers * layer + dim


class Cache(Protocol):
    """Keys and values of earlier positions, as attention sees them."""

    # True where a query may look; None: the keys are the queries' own, causal
    mask_BTS: Tensor | None

    def update(self, layer: int, keys_BKTE: Tensor, values_BKTE: Tensor) -> tuple[Tensor, Tensor]:
        """Append rotated keys and values of one layer; returns all keys_BKSE and values_BKSE."""
        ...


@dataclass(frozen=True)
class Context:
    """What all layers of one forward pass share."""

    cos_BT1E: Tensor  # fp32; B is 1 if all rows have the same positions
    sin_BT1E: Tensor  # negative in the first half
    bias_B1TS: Tensor | None  # added to the scores; None: plain causal attention
    explicit: bool
    cache: Cache | None
    fused: fused.View | None = None  # for our own kernels, where they run
    documents: Documents | None = None  # for the kernel that needs no mask, where it runs


class Linear(nn.Linear):
    """A matrix without bias; `initialise` fills it, not the constructor."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def reset_parameters(self) -> None:
        pass


def is_bare(*projections: nn.Module) -> bool:
    """Whether kernels may multiply with these modules' weights instead of calling them: an adapter
    must be called."""
    return all(type(projection) is Linear for projection in projections)


class Embedding(nn.Embedding):
    """Token embeddings; `initialise` fills them, not the constructor."""

    def reset_parameters(self) -> None:
        pass


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight, in fp32; the result has the precision of the products that
    follow.

    It reads the residual stream, so it is also what adds a block's output to the stream: one pass
    over memory for both.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x_BTD: Tensor, update_BTD: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The stream x + update (x without one), and its norm."""
        kind = working_dtype(x_BTD)
        if fused.runs(x_BTD):
            return fused.normalise(x_BTD, update_BTD, self.weight, self.eps, kind)

        x_BTD = x_BTD if update_BTD is None else x_BTD + update_BTD
        # it fuses as well, and in PyTorch 2.11 it loses gradients made by hand
        if torch.compiler.is_compiling():
            x32 = x_BTD.float()
            scale = torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
            return x_BTD, (x32 * scale * self.weight).to(kind)

        normed_BTD: Tensor = _Normalise.apply(x_BTD, self.weight, self.eps, kind)  # type: ignore[no-untyped-call]
        return x_BTD, normed_BTD


class _Normalise(torch.autograd.Function):
    """RMSNorm with its gradient by hand: half the passes over memory that recorded operations
    take."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, kind: torch.dtype) -> Tensor:
        x32 = x.float()
        scale = torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, scale)

        return (x32 * scale).mul_(weight).to(kind)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight, scale = ctx.saved_tensors
        unit, grad = x * scale, grad.float()
        product = grad * unit
        grad_weight = product.flatten(0, -2).sum(0).to(weight.dtype)
        along = product.mul_(weight).mean(-1, keepdim=True)
        grad_x = (grad * weight).sub_(unit.mul_(along)).mul_(scale)

        return grad_x.to(x.dtype), grad_weight, None, None


class Attention(nn.Module):
    """Causal self-attention; each of K key heads serves G query heads (§2.2: grouped-query
    attention)."""

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        dim, kv = config.hidden_size, config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(dim, dim)
        self.k_proj = Linear(dim, kv)
        self.v_proj = Linear(dim, kv)
        self.o_proj = Linear(dim, dim)

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        rows, length, _ = x_BTD.shape
        if context.fused is not None and context.cache is not None:
            out_BTD, k_BKTE, v_BKTE = fused.attention_apart(
                self.q_proj(x_BTD),
                self.k_proj(x_BTD),
                self.v_proj(x_BTD),
                self.head_dim,
                context.fused,
            )
            context.cache.update(self.layer, k_BKTE, v_BKTE)
            read_BTD: Tensor = self.o_proj(out_BTD)

            return read_BTD

        if context.fused is not None:
            weights = (self.q_proj.weight, self.k_proj.weight, self.v_proj.weight)
            joined_BTD: Tensor = self.o_proj(
                fused.attention(x_BTD, weights, self.head_dim, context.fused)
            )
            return joined_BTD

        q_BHTE, k_BKTE = (
            rotate(project(x_BTD).view(rows, length, -1, self.head_dim), context).transpose(1, 2)
            for project in (self.q_proj, self.k_proj)
        )
        v_BKTE = self.v_proj(x_BTD).view(rows, length, -1, self.head_dim).transpose(1, 2)
        if context.cache is not None:
            k_BKTE, v_BKTE = context.cache.update(self.layer, k_BKTE, v_BKTE)

        if context.documents is not None:
            out_BHTE = document_attention(q_BHTE, k_BKTE, v_BKTE, context.documents)
        else:
            attend = explicit_attention if context.explicit else fused_attention
            out_BHTE = attend(q_BHTE, k_BKTE, v_BKTE, context.bias_B1TS)

        joined: Tensor = self.o_proj(out_BHTE.transpose(1, 2).reshape(rows, length, -1))
        return joined


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) · up(x))."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        if context.cache is None and fused.runs(x_BTD) and is_bare(self.gate_proj, self.up_proj):
            gated_BTF = fused.gated(x_BTD, self.gate_proj.weight, self.up_proj.weight)
        elif context.cache is not None and fused.runs(x_BTD):
            gated_BTF = fused.gated_apart(self.gate_proj(x_BTD), self.up_proj(x_BTD))
        else:
            gated_BTF = F.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD)

        out_BTD: Tensor = self.down_proj(gated_BTF)
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
        """Takes and returns the stream and what is still to be added to it: the output of the last
        feed-forward."""
        x_BTD, normed_BTD = self.input_layernorm(x_BTD, update_BTD)
        x_BTD, normed_BTD = self.post_attention_layernorm(
            x_BTD, self.self_attn(normed_BTD, context)
        )
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
    ) -> Tensor:
        """Normed hidden states of the last layer, [B, T, D]."""
        x_BTD = self.embed_tokens(tokens_BT)
        context = self.context(x_BTD, documents_BT, positions_BT, cache)
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

    @property
    def bare(self) -> bool:
        """Whether no projection whose weight our kernels read has been replaced."""
        return all(
            isinstance(layer, Layer)
            and is_bare(
                layer.self_attn.q_proj,
                layer.self_attn.k_proj,
                layer.self_attn.v_proj,
                layer.mlp.gate_proj,
                layer.mlp.up_proj,
            )
            for layer in self.layers
        )

    def context(
        self,
        x_BTD: Tensor,
        documents_BT: Tensor | None,
        positions_BT: Tensor | None,
        cache: Cache | None,
    ) -> Context:
        """Rotary tables and mask, made once for all layers."""
        length, where = x_BTD.shape[1], x_BTD.device
        # With a cache there is no backward pass. (Not a matter of gradient mode: PPO's ratios must
        # begin at exactly 1.)
        explicit = devices.is_cpu(where) and cache is None and length <= EXPLICIT_LENGTH
        prompt = cache is not None and cache.mask_BTS is None and not torch.is_grad_enabled()
        own = (
            (explicit or (prompt and length <= EXPLICIT_LENGTH)) and fused.runs(x_BTD) and self.bare
        )

        if positions_BT is None:
            positions_BT = torch.arange(length, device=where)[None]
            if documents_BT is not None:
                positions_BT = positions_within(documents_BT)

        cos_BT1E, sin_BT1E = rotary_tables(
            positions_BT, self.config.head_dim, self.config.rope_theta
        )
        if own:
            starts_BT = None if documents_BT is None else document_starts(documents_BT)
            return Context(
                cos_BT1E, sin_BT1E, None, False, cache, fused.View(cos_BT1E, sin_BT1E, starts_BT)
            )

        if documents_BT is not None and where.type in attention.DEVICES:
            documents = documents_of(documents_BT, working_dtype(x_BTD), self.config.head_dim)
            if documents is not None:
                return Context(cos_BT1E, sin_BT1E, None, False, None, None, documents)

        mask_BTS = cache.mask_BTS if cache is not None else None
        if documents_BT is not None:
            mask_BTS = same_document(documents_BT)

        if mask_BTS is None and explicit:
            mask_BTS = causal(length, where)[None]

        bias_B1TS = None
        if mask_BTS is not None:
            kind = working_dtype(x_BTD)
            # The least finite number, not -inf: a row that sees nothing (an idle cache slot) must
            # not become NaN.
            bias_B1TS = torch.zeros(mask_BTS.shape, dtype=kind, device=where)
            bias_B1TS = bias_B1TS.masked_fill(~mask_BTS, torch.finfo(kind).min)[:, None]

        return Context(cos_BT1E, sin_BT1E, bias_B1TS, explicit, cache)


class Llama(nn.Module):
    """The language model. On construction its weights are drawn from `seed` (see `initialise`)."""

    def __init__(self, config: LlamaConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        self.lm_head = (
            None if config.tie_word_embeddings else Linear(config.hidden_size, config.vocab_size)
        )
        initialise(self, seed)

    @property
    def head_weight(self) -> Tensor:
        """The output matrix [V, D]; the embeddings' own if they are tied."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """Logits [..., V] in fp32 of final hidden states (`forward` with head=False)."""
        return F.linear(hidden_BTD, self.head_weight).float()

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
        """Logits [B, T, V] in fp32; with head=False the final normed hidden states [B, T, D]; with
        targets, their log-probabilities [B, T] in fp32 (see `likelihood`), and with entropy=True a
        pair: these and the entropy [B, T] of each predicted distribution in nats, which carries no
        gradient.

        documents_BT: the document of each packed token: attention stays inside a document, and
        positions restart. Right-padded rows need no mask, since attention is causal. With a cache,
        positions_BT must be given.
        """
        hidden_BTD = self.model(tokens_BT, documents_BT, positions_BT, cache)
        if targets_BT is None:
            return self.logits(hidden_BTD) if head else hidden_BTD

        weight_VD = self.head_weight.to(hidden_BTD.dtype)
        if entropy:
            return log_likelihood_and_entropy(hidden_BTD, weight_VD, targets_BT)

        return log_likelihood(hidden_BTD, weight_VD, targets_BT)


def initialise(model: nn.Module, seed: int) -> None:
    """Draw all weights: normal with deviation 0.02, the two projections that write to the residual
    stream with
    0.02 / sqrt(2 · layers) so that its variance does not grow with depth; norms are one.

    The paper does not state its initialisation. A model on the meta device is left alone.
    """
    generator = torch.Generator().manual_seed(seed)
    layers = sum(isinstance(module, Layer) for module in model.modules())
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            continue

        with torch.no_grad():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                std = INITIAL_STD / math.sqrt(2 * layers) if residual else INITIAL_STD
                parameter.copy_(torch.empty(parameter.shape).normal_(0.0, std, generator=generator))


def working_dtype(x: Tensor) -> torch.dtype:
    """The precision in which products run: autocast's where it is on, else that of the
    activations."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def rotary_tables(positions_BT: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin of position / theta^(2 i / head_dim) in fp32, [B, T, 1, head_dim], for `rotate`:
    both halves of a head hold the same angles, and the sine is negated in the first."""
    exponents_E = (
        torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions_BT.device) / head_dim
    )
    angles_BT1E = (positions_BT.float()[..., None] * (1.0 / theta**exponents_E))[:, :, None]
    cos, sin = angles_BT1E.cos(), angles_BT1E.sin()

    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x_BTHE: Tensor, context: Context) -> Tensor:
    """Rotate dimension i of each head with dimension i + head_dim / 2 by the angle of its position,
    in fp32."""
    x = x_BTHE.float()
    swapped = x.roll(x.shape[-1] // 2, dims=-1)
    return (x * context.cos_BT1E).add_(swapped.mul_(context.sin_BT1E)).to(x_BTHE.dtype)


def causal(length: int, device: torch.device) -> Tensor:
    """[T, T], True where a position may look: at itself and at what came before."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


def same_document(documents_BT: Tensor) -> Tensor:
    """[B, T, T], True where a position may look: at itself and at earlier positions of its
    document."""
    same_BTT = documents_BT[:, :, None] == documents_BT[:, None, :]
    return same_BTT & causal(documents_BT.shape[1], documents_BT.device)


def document_starts(documents_BT: Tensor) -> Tensor:
    """The first position of each token's document (documents are runs of one id)."""
    index_T = torch.arange(documents_BT.shape[1], device=documents_BT.device)
    changes_BT = F.pad(documents_BT[:, 1:] != documents_BT[:, :-1], (1, 0), value=False)
    return torch.where(changes_BT, index_T, 0).cummax(dim=1).values


def positions_within(documents_BT: Tensor) -> Tensor:
    """The position of each token inside its document."""
    return torch.arange(documents_BT.shape[1], device=documents_BT.device) - document_starts(
        documents_BT
    )
