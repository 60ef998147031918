"""Bytes and FLOPs of models at work: weights and what is kept beside them, counted one by one.

Bytes a number: 4 in fp32, 2 in bf16.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llama2.devices import Precision
from llama2.model.likelihood import KEEP_BYTES, LARGE_CHUNK_BYTES
from llama2.model.llama import LlamaConfig
from llama2.stages.common.sampling import Sample
from llama2.stages.common.training import Training


def size_of(precision: Precision) -> int:
    """Return the bytes of one number."""
    return 4 if precision == "fp32" else 2


@dataclass(frozen=True)
class Tower:
    """A network that is trained: `Llama`, or with `scalar` a `Scorer` of the same trunk."""

    shape: LlamaConfig
    scalar: bool = False

    @property
    def parameters(self) -> int:
        """Number of parameters, exactly."""
        shape = self.shape
        if not self.scalar:
            return shape.parameters()

        head = 0 if shape.tie_word_embeddings else shape.vocab_size * shape.hidden_size
        return shape.parameters() - head + shape.hidden_size

    def count_trained(self, frozen_layers: int) -> int:
        """Count the parameters that train where the lowest layers and the embeddings do not."""
        if not frozen_layers:
            return self.parameters

        table = self.shape.vocab_size * self.shape.hidden_size
        return self.parameters - table - frozen_layers * self.block

    @property
    def block(self) -> int:
        """Parameters of one layer."""
        trunk = self.parameters - self.root
        return trunk // self.shape.num_hidden_layers

    @property
    def root(self) -> int:
        """Parameters outside of the layers: embeddings, last norm, head."""
        shape, dim = self.shape, self.shape.hidden_size
        tables = 1 if self.scalar or shape.tie_word_embeddings else 2
        return tables * shape.vocab_size * dim + dim + (dim if self.scalar else 0)


# --- training ---
def is_sharded(settings: Training, ranks: int) -> bool:
    """Tell whether FSDP2 spreads the model: it does nothing on one rank."""
    return settings.parallel == "shard" and ranks > 1


def transient_bytes(towers: Sequence[Tower], settings: Training, ranks: int) -> float:
    """Bytes beside the state: copies of weights in the precision of the products, and gradients on
    their way.

    Sharded: two layers and the root gathered, the gradients of one layer and the root, and one
    layer's in fp32 before and after they are summed. Replicated: autocast keeps bf16 copies, and
    gradients are summed as one flat block.
    """
    size = size_of(settings.precision)
    if is_sharded(settings, ranks):
        block = max(tower.block for tower in towers)
        root = sum(tower.root for tower in towers)
        return size * (2 * block + root) + size * (block + root) + 2 * 4 * block

    count = sum(tower.parameters for tower in towers)
    trained = sum(tower.count_trained(settings.frozen_layers) for tower in towers)
    copies = size * count if size == 2 else 0
    gradients = 4 * trained if ranks > 1 else 0
    return copies + gradients


def activations(
    towers: Sequence[Tower], settings: Training, rows: int, length: int, packed: bool, spread: bool
) -> float:
    """Bytes kept for the backward pass of one micro-batch, and one layer's gradients as it is gone
    through."""
    tokens, size = rows * length, size_of(settings.precision)
    # autocast leaves the residual stream in fp32, FSDP2 makes it bf16
    residual = 2 if size == 2 and spread else 4
    masked = packed and size == 4  # in bf16 the kernel is told where documents begin
    # which position may look where, once for all layers
    total = (1.0 + size) * tokens * length if masked else 0.0

    for tower in towers:
        shape = tower.shape
        stream = tokens * shape.hidden_size
        layer = tokens * layer_bytes(shape, size, residual)
        if size == 4:
            layer += tokens * repeat_bytes(shape, size)

        # what a layer keeps until the backward pass reaches it
        stored = stream * residual if settings.gradient_checkpointing else layer
        layers = shape.num_hidden_layers - settings.frozen_layers
        total += layers * stored + 2 * layer + stream * (residual + size)

        if not tower.scalar:
            logits = tokens * shape.vocab_size
            total += min(size * logits, KEEP_BYTES) + min(4 * logits, LARGE_CHUNK_BYTES)

    return total


def layer_bytes(shape: LlamaConfig, size: int, residual: int) -> int:
    """Bytes a token that one layer keeps: the stream at its two norms and their results; queries,
    keys, values and what attention makes of them; gate, its SiLU, up and their product."""
    dim, heads = shape.hidden_size, 2 * shape.query_size + 2 * shape.key_size
    return 2 * residual * dim + size * (2 * dim + heads + 4 * shape.intermediate_size)


def repeat_bytes(shape: LlamaConfig, size: int) -> int:
    """Bytes a token that a layer keeps more where keys and values are repeated for the heads that
    share them: in fp32, and for masks (`model/attention.py`)."""
    more = shape.num_attention_heads - shape.num_key_value_heads
    return 2 * size * shape.head_dim * more


def flops_per_token(
    config: LlamaConfig, length: float, scalar: bool = False, frozen_layers: int = 0
) -> float:
    """FLOPs of the forward and backward pass, causal attention counted at half: 6 N + 6 L d T,
    input embedding not counted. Layers that are frozen have no backward pass.

    A reward model (`scalar`) has a head of one row and reads it at one token of a conversation,
    which is nothing. For rows of several lengths, T is their mean with each token counted once: the
    sum of T^2 over the sum of T.
    """
    # of those counted, not multiplied with
    tables = (1 if config.tie_word_embeddings else 2) - (0 if scalar else 1)
    unused = tables * config.vocab_size * config.hidden_size
    attention = config.query_size * length
    every = config.parameters() - unused + config.num_hidden_layers * attention
    frozen = frozen_layers * (Tower(config).block + attention)
    return 6.0 * every - 4.0 * frozen


# --- sampling and judging ---
def engine_bytes(shape: LlamaConfig, sample: Sample, *, copied: bool) -> float:
    """The engine's cache, for prompts as long as the longest answers, its copy of fp32 weights that
    are trained, and the memory of recorded steps."""
    size = size_of(sample.precision)
    copy = shape.parameters() * size if size == 2 and copied else 0
    return copy + cache_bytes(shape, sample, 2 * sample.max_tokens) + graph_bytes(shape, sample)


def graph_bytes(shape: LlamaConfig, sample: Sample) -> float:
    """Bytes that steps recorded on a GPU keep between calls, however many they are: the logits that
    they leave, and in the memory that they share those of a product, in its precision and in fp32.
    All else is small beside them."""
    return float((4 + 4 + size_of(sample.precision)) * sample.slots * shape.vocab_size)


def cache_bytes(shape: LlamaConfig, sample: Sample, columns: int) -> float:
    """Keys and values of so many tokens in every slot."""
    columns = min(columns, shape.max_position_embeddings)
    numbers = 2 * shape.num_hidden_layers * shape.key_size
    return float(sample.slots * columns * numbers * size_of(sample.precision))


def decoder_bytes(shape: LlamaConfig, precision: Precision) -> float:
    """The matrices of the layers and the head as a CPU's decoding step reads them."""
    vectors = shape.num_hidden_layers * shape.vectors() + shape.hidden_size
    lookup = 0 if shape.tie_word_embeddings else shape.vocab_size * shape.hidden_size
    return float(size_of(precision) * (shape.parameters() - vectors - lookup))


def forward_bytes(
    shape: LlamaConfig, tokens: int, precision: Precision, *, bare: bool = False
) -> float:
    """The most that is alive inside a layer of a forward pass without gradient: the stream before
    and within the layer, and either, while queries are rotated, three of them in fp32 and five more
    in the precision of the products, or the update, the norm and three of the feed-forward's width.
    `bare`: weights are in the precision of the products, and so is the stream; autocast leaves it
    in fp32."""
    size, dim = size_of(precision), shape.hidden_size
    stream = 2 * (size if bare else 4) * dim
    rotation = (3 * 4 + 4 * size) * shape.query_size + size * dim
    feed_forward = 2 * size * dim + 3 * size * shape.intermediate_size
    return float(tokens * (stream + max(rotation, feed_forward)))


def draw_bytes(shape: LlamaConfig, slots: int) -> float:
    """Logits of every slot in fp32, and what drawing makes of them: weights, their sums, and a
    comparison."""
    return 4.0 * 5 * slots * shape.vocab_size


def scorer_bytes(shapes: Sequence[LlamaConfig | None], precision: Precision) -> float:
    """Reward models, whole: the layers' matrices in the precision of the products, all else in fp32
    (`frozen`)."""
    total = 0.0
    for shape in shapes:
        if shape is not None:
            tower = Tower(shape, scalar=True)
            matrices = shape.num_hidden_layers * (tower.block - shape.vectors())
            total += 4 * tower.parameters - (4 - size_of(precision)) * matrices

    return total
