"""The shape of a model: sizes of the paper's (table 1, A.2.1), and what its relatives vary."""

from __future__ import annotations

from dataclasses import dataclass

from llama2.errors import UserError
from llama2.model.rope import RopeScaling

_SIZE = (1, 1 << 26)
"""of every dimension: a damaged file must not make us describe a model without end"""
_BOUNDS: dict[str, tuple[float, float]] = {
    "vocab_size": _SIZE,
    "hidden_size": _SIZE,
    "intermediate_size": _SIZE,
    "num_hidden_layers": (1, 1 << 10),
    "num_attention_heads": _SIZE,
    "num_key_value_heads": _SIZE,
    "max_position_embeddings": _SIZE,
    "head_dim": (2, 1 << 26),
    # beyond, fp32 has no rotary tables and no norms that mean anything
    "rope_theta": (1.0, 1e15),
    "rms_norm_eps": (1e-30, 1.0),
}
_PAIRS = "rotary positions pair the dimensions of a head"


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
    bos_token_id: int | None = 1
    """None: the model has none"""
    eos_token_id: int | tuple[int, ...] = 2
    """one id, or several of which each ends an answer"""
    head_dim: int = 0
    """numbers of one head; 0: hidden_size / num_attention_heads"""
    rope_scaling: RopeScaling | None = None
    attention_bias: bool = False
    """queries, keys and values have a bias (Qwen 2)"""
    attention_output_bias: bool = False
    """so has what attention writes; config.json's attention_bias of a Llama says both"""

    def __post_init__(self) -> None:
        self._check_heads()
        for name, (least, most) in _BOUNDS.items():
            value = getattr(self, name)
            if not least <= value <= most:
                raise UserError(
                    f"{name} is {value}", f"it must be at least {least:g} and at most {most:.8g}"
                )

        self._check_rope()
        stops = self.stops
        if not stops:
            raise UserError("eos_token_id is empty", "name an id that ends an answer")

        if self.bos_token_id is not None:
            self._check_token("bos_token_id", self.bos_token_id)
        for token in stops:
            self._check_token("eos_token_id", token)

        # one way to say one thing
        object.__setattr__(self, "eos_token_id", stops[0] if len(stops) == 1 else stops)

    def _check_heads(self) -> None:
        """Fill in `head_dim`. UserError for heads that cannot be."""
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if min(self.hidden_size, heads, kv_heads) < 1:
            return  # their bounds say more

        if self.head_dim % 2:
            raise UserError(f"head_dim is {self.head_dim}, an odd number", _PAIRS)
        if self.hidden_size % (heads if self.head_dim else 2 * heads):
            size = "" if self.head_dim else " of an even size"
            raise UserError(
                f"hidden_size {self.hidden_size} does not divide into {heads} heads{size}", _PAIRS
            )
        if heads % kv_heads:
            raise UserError(
                f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}",
                "each key head serves the same number of query heads",
            )
        if self.attention_output_bias and not self.attention_bias:
            raise UserError(
                "attention has a bias behind it and none before it", "no program knows such a model"
            )

        object.__setattr__(self, "head_dim", self.head_dim or self.hidden_size // heads)

    def _check_rope(self) -> None:
        """UserError for scaled positions that have no numbers at this shape."""
        scaling = self.rope_scaling
        if scaling is None:
            return

        if scaling.rope_type == "yarn" and self.rope_theta == 1:
            raise UserError("rope_theta is 1", "the rope type 'yarn' needs a larger one")
        if scaling.rope_type == "dynamic" and self.head_dim < 4:
            raise UserError(
                f"head_dim is {self.head_dim}", "the rope type 'dynamic' needs at least 4"
            )
        if scaling.rope_type == "dynamic" and self.max_position_embeddings != scaling.extended:
            raise UserError(
                f"max_position_embeddings is {self.max_position_embeddings}, and the rope type "
                f"'dynamic' extends {scaling.original} positions to {scaling.extended}",
                "these must be equal",
            )

    def _check_token(self, name: str, token: int) -> None:
        if not 0 <= token < self.vocab_size:
            raise UserError(
                f"{name} is {token}",
                f"it must be an id of the vocabulary, at least 0 and below "
                f"vocab_size {self.vocab_size}",
            )

    @property
    def stops(self) -> tuple[int, ...]:
        """Ids that end an answer, each once, in the order of `eos_token_id`."""
        listed = (self.eos_token_id,) if isinstance(self.eos_token_id, int) else self.eos_token_id
        return tuple(dict.fromkeys(listed))

    @property
    def query_size(self) -> int:
        """Numbers of all query heads of a token."""
        return self.num_attention_heads * self.head_dim

    @property
    def key_size(self) -> int:
        """Numbers of all key heads, or of all value heads, of a token."""
        return self.num_key_value_heads * self.head_dim

    def vectors(self) -> int:
        """Count the numbers of a layer that are no matrices: norms and biases."""
        biases = self.attention_bias * (self.query_size + 2 * self.key_size)
        return 2 * self.hidden_size + biases + self.attention_output_bias * self.hidden_size

    def parameters(self) -> int:
        """Count the parameters of a language model of this shape; tied embeddings count once."""
        dim = self.hidden_size
        attention = 2 * dim * self.query_size + 2 * dim * self.key_size
        layer = attention + 3 * dim * self.intermediate_size + self.vectors()
        embeddings = self.vocab_size * dim * (1 if self.tie_word_embeddings else 2)

        return embeddings + self.num_hidden_layers * layer + dim
