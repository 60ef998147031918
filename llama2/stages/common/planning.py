"""What a run would take, told from its configuration alone (`--dry-run`): parameters, tokens,
steps, FLOPs, memory.

Nothing is read but the config.json of checkpoints that exist already; what an earlier step of the
recipe will leave behind is known from its own plan (`Lineage`). Memory is that of this code on
GPUs, estimated: fp32 weights, gradients and two moments; what FSDP2 gathers; the tensors a layer
keeps for its backward pass, counted one by one; and whole models that are only read, which every
rank holds. What the CUDA context, NCCL and fragmentation take (a few GiB) comes on top.

Bytes a number: 4 in fp32, 2 in bf16.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import Field

from llama2.config import Config
from llama2.formats import checkpoint
from llama2.generate.batch import PREFILL_TOKENS
from llama2.mesh import Precision
from llama2.model import quantize
from llama2.model.likelihood import KEEP_BYTES, LARGE_CHUNK_BYTES
from llama2.model.llama import LlamaConfig
from llama2.stages.common.answers import JUDGED_TOKENS
from llama2.stages.common.sampling import Sample
from llama2.stages.common.training import Training
from llama2.tokenizer.directory import find_tokenizer
from llama2.tokenizer.tokenizer import Tokenizer

GIB = float(1 << 30)
NONE = "none: what every rank holds whole does not fit"
UNKNOWN = {
    "parameters": "known when the model it starts from exists, or an earlier step of the recipe makes it"
}


class Cluster(Config):
    """The machines a dry run reckons with; the defaults are the paper's A100-80GB."""

    ranks: int | None = Field(None, gt=0)
    """data-parallel ranks, one device each; the step's own number unless given"""
    gib: float = Field(80.0, gt=0)
    """memory of a device"""
    tflops: float = Field(312.0, gt=0)
    """dense bf16 peak of a device"""
    mfu: float = Field(0.4, gt=0, le=1)
    """share of that peak which training reaches"""


@dataclass
class Lineage:
    """What earlier steps will leave behind, by run directory: models and vocabularies."""

    shapes: dict[Path, LlamaConfig] = field(default_factory=dict)
    vocabularies: dict[Path, int] = field(default_factory=dict)

    def shape(self, path: Path) -> LlamaConfig | None:
        """The architecture of the checkpoint that is, or will be, at `path`; None if nobody can
        tell."""
        if path in self.shapes:
            return self.shapes[path]

        return checkpoint.config_of(path) if (path / checkpoint.CONFIG).is_file() else None

    def inherit(self, out: Path, source: Path) -> LlamaConfig | None:
        """A step that leaves a model of the shape it found at `source`."""
        found = self.shape(source)
        if found is not None:
            self.shapes[out] = found

        return found

    def vocabulary(self, path: Path) -> int | None:
        """The size of the vocabulary of the tokenizer that is, or will be, at `path`."""
        if path in self.vocabularies:
            return self.vocabularies[path]

        found = find_tokenizer(path) if path.is_dir() else path.is_file()
        return Tokenizer.load(path).vocab_size if found else None

    def inherit_vocabulary(self, out: Path, source: Path) -> dict[str, Any]:
        """A step that carries on the tokenizer it found at `source`."""
        size = self.vocabulary(source)
        if size is None:
            return {}

        self.vocabularies[out] = size
        return {"vocab_size": size}


@dataclass(frozen=True)
class Tower:
    """A network that is trained: `Llama`, or with `scalar` a `Scorer` of the same trunk."""

    shape: LlamaConfig
    scalar: bool = False

    @property
    def parameters(self) -> int:
        """The exact number."""
        shape = self.shape
        if not self.scalar:
            return shape.parameters()

        head = 0 if shape.tie_word_embeddings else shape.vocab_size * shape.hidden_size
        return shape.parameters() - head + shape.hidden_size

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


def training_plan(
    towers: Sequence[Tower],
    settings: Training,
    cluster: Cluster,
    *,
    rows: int,
    micro_rows: int,
    length: int,
    steps: int | None,
    packed: bool = False,
    whole: float = 0.0,
    reference: LlamaConfig | None = None,
) -> dict[str, Any]:
    """What a dry run says of a stage that trains `towers` on `rows` rows of `length` tokens an
    optimizer step.

    micro_rows: rows a rank computes at a time. whole: bytes of models that every rank holds
    besides. reference: a model that is only read, and is spread over the ranks like those that are
    trained.
    """
    ranks = cluster.ranks or 1

    def parts(count: int) -> dict[str, float]:
        spread = sharded(settings, count)
        kept = activations(
            towers, settings, min(micro_rows, -(-rows // count)), length, packed, spread
        )
        states = 16 * sum(tower.parameters for tower in towers)
        read = (
            (4 if spread else _size(settings.precision)) * reference.parameters()
            if reference
            else 0
        )

        return {
            "weights_and_optimizer": states / (count if spread else 1),
            **({"reference": read / (count if spread else 1)} if reference else {}),
            "gathered": gathered(towers, settings, count),
            "activations": kept,
            "whole_models": whole,
        }

    flops = (
        sum(flops_per_token(tower.shape, length, tower.scalar) for tower in towers) * rows * length
    )
    return {
        "parameters": sum(tower.parameters for tower in towers),
        "ranks": ranks,
        "steps": steps or "known when the data is read",
        "tokens_per_step": rows * length,
        "tokens": rows * length * steps if steps else "known when the data is read",
        "micro_batches_per_step": math.ceil(math.ceil(rows / ranks) / micro_rows),
        **_time(flops, steps, cluster),
        **_described(parts(ranks), cluster, _fewest(parts, cluster, settings)),
    }


def _time(flops: float, steps: int | None, cluster: Cluster) -> dict[str, Any]:
    seconds = flops / (cluster.mfu * cluster.tflops * 1e12)
    if steps is None:
        return {"flops_per_step": _rounded(flops), "gpu_hours_per_step": _rounded(seconds / 3600)}

    return {"flops": _rounded(flops * steps), "gpu_hours": _rounded(seconds * steps / 3600)}


def _fewest(
    parts: Callable[[int], dict[str, float]], cluster: Cluster, settings: Training
) -> int | str:
    """The smallest number of ranks that holds a rank's parts."""
    budget = cluster.gib * GIB
    if sum(parts(1).values()) <= budget:
        return 1

    spread = parts(2)
    states = 2 * (spread.pop("weights_and_optimizer") + spread.pop("reference", 0.0))
    room = budget - sum(spread.values())

    return max(2, math.ceil(states / room)) if settings.parallel == "shard" and room > 0 else NONE


def _described(parts: dict[str, float], cluster: Cluster, fewest: int | str) -> dict[str, Any]:
    together = sum(parts.values())
    return {
        "memory_per_rank_gib": {
            **{name: _rounded(value / GIB) for name, value in parts.items()},
            "together": _rounded(together / GIB),
        },
        f"fits_{cluster.gib:g}_gib": together <= cluster.gib * GIB,
        "fewest_ranks": fewest,
    }


def sharded(settings: Training, ranks: int) -> bool:
    """Whether FSDP2 spreads the model: it does nothing on one rank."""
    return settings.parallel == "shard" and ranks > 1


def gathered(towers: Sequence[Tower], settings: Training, ranks: int) -> float:
    """Bytes beside the state: copies of weights in the precision of the products, and gradients on
    their way.

    Sharded: two layers and the root gathered, the gradients of one layer and the root, and one
    layer's in fp32 before and after they are summed. Replicated: autocast keeps bf16 copies, and
    gradients are summed as one flat block.
    """
    size = 4 if settings.precision == "fp32" else 2
    if sharded(settings, ranks):
        block, root = max(tower.block for tower in towers), sum(tower.root for tower in towers)
        return size * (2 * block + root) + size * (block + root) + 2 * 4 * block

    count = sum(tower.parameters for tower in towers)
    return (size * count if size == 2 else 0) + (4 * count if ranks > 1 else 0)


def activations(
    towers: Sequence[Tower], settings: Training, rows: int, length: int, packed: bool, spread: bool
) -> float:
    """Bytes kept for the backward pass of one micro-batch, and one layer's gradients as it is gone
    through."""
    tokens, size = rows * length, 4 if settings.precision == "fp32" else 2
    # autocast leaves the residual stream in fp32, FSDP2 makes it bf16
    residual = 2 if size == 2 and spread else 4
    masked = packed and size == 4  # in bf16 the kernel is told where documents begin
    # which position may look where, once for all layers
    total = (1.0 + size) * tokens * length if masked else 0.0

    for tower in towers:
        shape = tower.shape
        layer = tokens * (
            layer_bytes(shape, size, residual) + (repeated_bytes(shape, size) if size == 4 else 0)
        )
        kept = tokens * shape.hidden_size * residual if settings.gradient_checkpointing else layer
        total += (
            shape.num_hidden_layers * kept
            + 2 * layer
            + tokens * shape.hidden_size * (residual + size)
        )

        if not tower.scalar:
            logits = tokens * shape.vocab_size
            total += min(size * logits, KEEP_BYTES) + min(4 * logits, LARGE_CHUNK_BYTES)

    return total


def layer_bytes(shape: LlamaConfig, size: int, residual: int) -> int:
    """Bytes a token that one layer keeps: the stream at its two norms and their results; queries,
    keys, values and what attention makes of them; gate, its SiLU, up and their product."""
    dim, kv = shape.hidden_size, shape.num_key_value_heads * shape.head_dim
    return 2 * residual * dim + size * (2 * dim + 2 * dim + 2 * kv + 4 * shape.intermediate_size)


def repeated_bytes(shape: LlamaConfig, size: int) -> int:
    """Bytes a token that a layer keeps more where keys and values are repeated for the heads that
    share them: in fp32, and for masks (`model/attention.py`)."""
    more = shape.num_attention_heads - shape.num_key_value_heads
    return 2 * size * shape.head_dim * more


def flops_per_token(config: LlamaConfig, length: float, scalar: bool = False) -> float:
    """Forward and backward, causal attention counted at half: 6 N + 6 L d T, input embedding not
    counted.

    A reward model (`scalar`) has a head of one row and reads it at one token of a conversation,
    which is nothing. For rows of several lengths, T is their mean with each token counted once: the
    sum of T^2 over the sum of T.
    """
    # of those counted, not multiplied with
    tables = (1 if config.tie_word_embeddings else 2) - (0 if scalar else 1)
    unused = tables * config.vocab_size * config.hidden_size
    return 6.0 * (
        config.parameters() - unused + config.num_hidden_layers * config.hidden_size * length
    )


def total(plans: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What all steps of a recipe come to: GPU-hours where they are known, and the steps that do not
    fit."""
    hours = {name: plan["gpu_hours"] for name, plan in plans.items() if "gpu_hours" in plan}
    tight = {
        name: {"gib": plan["memory_per_rank_gib"]["together"], "fewest_ranks": plan["fewest_ranks"]}
        for name, plan in plans.items()
        for key, fits in plan.items()
        if key.startswith("fits_") and not fits
    }
    return {
        "gpu_hours": _rounded(sum(hours.values())),
        "gpu_hours_unknown_of": [
            name
            for name, plan in plans.items()
            if name not in hours and "memory_per_rank_gib" in plan
        ],
        "do_not_fit": tight,
    }


# --- stages that sample
# ----------------------------------------------------------------------------------------------


def sampling_plan(
    policies: Sequence[LlamaConfig | None],
    scorers: Sequence[LlamaConfig | None],
    sample: Sample,
    cluster: Cluster,
) -> dict[str, Any]:
    """What a dry run says of a stage that samples: every rank holds policies and reward models
    whole.

    Policies that a server samples are not held here.
    """
    known = [shape for shape in policies if shape is not None]
    if len(known) < len(policies):
        return UNKNOWN

    here = known if sample.server is None else []
    parts = {
        "policies": float(_size(sample.precision) * sum(shape.parameters() for shape in here)),
        "engine_and_cache": max(
            (engine_bytes(shape, sample, copied=False) for shape in here), default=0.0
        ),
        "reward_models": scorer_bytes(scorers, sample.precision),
    }
    fewest = 1 if sum(parts.values()) <= cluster.gib * GIB else NONE

    return {
        "parameters": known[0].parameters(),
        "ranks": cluster.ranks or 1,
        **_described(parts, cluster, fewest),
    }


def judging_plan(
    versions: Mapping[str, LlamaConfig | None],
    judges: Mapping[str, LlamaConfig | None],
    precision: quantize.WeightPrecision,
    slots: int,
    max_tokens: int,
    cluster: Cluster,
    *,
    whole_context: bool = False,
    looked_at: bool = False,
) -> dict[str, Any]:
    """What a dry run says of a stage that asks one version after the other and then one judge after
    the other (`answers`): the most that a rank holds at a time is the largest of them.

    whole_context: dialogs are held until they fill the context. looked_at: the attention of
    versions is drawn. On a CPU the engine packs the weights once more for its decoding steps.
    """
    if any(shape is None for shape in (*versions.values(), *judges.values())):
        return UNKNOWN

    products = quantize.computing(precision)
    sample = Sample(max_tokens=max_tokens, slots=slots, precision=products)
    phases: dict[str, dict[str, float]] = {}
    packed = 0.0

    for shape in filter(None, versions.values()):
        weights = float(_size(products) * shape.parameters())
        copies = 0 if precision in ("fp32", "bf16") else weights
        columns = shape.max_position_embeddings if whole_context else 2 * max_tokens
        _largest(
            phases,
            "version",
            {
                "weights": weights,
                "copies": copies,
                "cache": cache_bytes(shape, sample, columns),
                "activations": max(
                    forward_bytes(shape, PREFILL_TOKENS, products, bare=True),
                    drawing_bytes(shape, slots),
                ),
            },
        )
        packed = max(packed, packed_bytes(shape, products))

        if looked_at:
            length = shape.max_position_embeddings
            _largest(phases, "attention", {"weights": weights, "activations": 4.0 * 4 * length**2})

    for shape in filter(None, judges.values()):
        _largest(
            phases,
            "judge",
            {
                "weights": scorer_bytes([shape], products),
                "activations": forward_bytes(shape, JUDGED_TOKENS, products),
            },
        )

    if not phases:
        return {}  # servers answer for all versions, and nobody judges

    sums = {name: sum(parts.values()) for name, parts in phases.items()}
    fits = max(sums.values()) <= cluster.gib * GIB
    return {
        "parameters": max((shape.parameters() for shape in versions.values() if shape), default=0),
        "ranks": cluster.ranks or 1,
        "memory_per_rank_gib": {
            **{
                name: {part: _rounded(value / GIB) for part, value in parts.items() if value}
                for name, parts in phases.items()
            },
            "together": _rounded(max(sums.values()) / GIB),
            "together_on_a_cpu": _rounded(
                max(sums.get("version", 0.0) + packed, *sums.values()) / GIB
            ),
        },
        f"fits_{cluster.gib:g}_gib": fits,
        "fewest_ranks": 1 if fits else NONE,
    }


def _largest(phases: dict[str, dict[str, float]], name: str, parts: dict[str, float]) -> None:
    """Keep the larger of two phases of one name: they come one after the other."""
    phases[name] = max(phases.get(name, {}), parts, key=lambda one: sum(one.values()))


def engine_bytes(shape: LlamaConfig, sample: Sample, *, copied: bool) -> float:
    """The engine's cache, for prompts as long as the longest answers, and its copy of fp32 weights
    that are trained."""
    size = _size(sample.precision)
    copy = shape.parameters() * size if size == 2 and copied else 0
    return copy + cache_bytes(shape, sample, 2 * sample.max_tokens)


def cache_bytes(shape: LlamaConfig, sample: Sample, columns: int) -> float:
    """Keys and values of so many tokens in every slot."""
    columns = min(columns, shape.max_position_embeddings)
    token = (
        2
        * shape.num_hidden_layers
        * shape.num_key_value_heads
        * shape.head_dim
        * _size(sample.precision)
    )
    return float(sample.slots * columns * token)


def packed_bytes(shape: LlamaConfig, precision: Precision) -> float:
    """The matrices of the layers and the head as a CPU's decoding step reads them."""
    vectors = (2 * shape.num_hidden_layers + 1) * shape.hidden_size
    lookup = 0 if shape.tie_word_embeddings else shape.vocab_size * shape.hidden_size
    return float(_size(precision) * (shape.parameters() - vectors - lookup))


def forward_bytes(
    shape: LlamaConfig, tokens: int, precision: Precision, *, bare: bool = False
) -> float:
    """The most that is alive inside a layer of a forward pass without gradient: the stream before
    and within the layer, and either, while queries are rotated, three of them in fp32 and five more
    in the precision of the products, or the update, the norm and three of the feed-forward's width.
    `bare`: weights are in the precision of the products, and so is the stream; autocast leaves it
    in fp32."""
    size, dim = _size(precision), shape.hidden_size
    stream = 2 * (size if bare else 4) * dim
    return float(
        tokens
        * (
            stream
            + max((3 * 4 + 5 * size) * dim, 2 * size * dim + 3 * size * shape.intermediate_size)
        )
    )


def drawing_bytes(shape: LlamaConfig, slots: int) -> float:
    """Logits of every slot in fp32, and what drawing makes of them: weights, their sums, and a
    comparison."""
    return 4.0 * 5 * slots * shape.vocab_size


def scorer_bytes(shapes: Sequence[LlamaConfig | None], precision: Precision) -> float:
    """Reward models, whole: the layers' matrices in the precision of the products, all else in fp32
    (`frozen`)."""
    found = 0.0
    for shape in shapes:
        if shape is not None:
            tower = Tower(shape, scalar=True)
            matrices = shape.num_hidden_layers * (tower.block - 2 * shape.hidden_size)
            found += 4 * tower.parameters - (4 - _size(precision)) * matrices

    return found


def _size(precision: Precision) -> int:
    return 4 if precision == "fp32" else 2


def _rounded(value: float) -> float:
    """Three digits: the estimates have no more."""
    return float(f"{value:.3g}")
