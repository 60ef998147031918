"""Estimates of what a run would take, told from its configuration alone (`--dry-run`): parameters,
tokens, steps, FLOPs, memory.

Nothing is read but the config.json of checkpoints that exist already; what an earlier step of the
recipe will leave behind is known from its own plan (`PlannedRuns`). Memory is that of this code on
GPUs, estimated: fp32 weights, gradients and two moments; what FSDP2 gathers; the tensors a layer
keeps for its backward pass, counted one by one; and whole models that are only read, which every
rank holds. What the CUDA context, NCCL and fragmentation take (a few GiB) comes on top.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import Field

from llama2.config import Config as Section
from llama2.formats import checkpoint
from llama2.generate.model_runner import PREFILL_TOKENS
from llama2.kernels import shapes as kernel_shapes
from llama2.model import quantize
from llama2.model.llama import LlamaConfig
from llama2.stages.common.answers import JUDGED_TOKENS
from llama2.stages.common.memory import (
    Tower,
    activations,
    cache_bytes,
    decoder_bytes,
    draw_bytes,
    engine_bytes,
    flops_per_token,
    forward_bytes,
    is_sharded,
    scorer_bytes,
    size_of,
    transient_bytes,
)
from llama2.stages.common.sampling import Sample
from llama2.stages.common.training import Training
from llama2.tokenizer.directory import find_tokenizer

GIB = float(1 << 30)
NONE = "none: what every rank holds whole does not fit"
UNKNOWN = {
    "parameters": "known when the model it starts from exists, or an earlier step of the recipe "
    "makes it"
}


class Cluster(Section):
    """Machines a dry run reckons with; the defaults are the paper's A100-80GB."""

    ranks: int | None = Field(None, gt=0)
    """data-parallel ranks, one device each; the step's own number unless given"""
    gib: float = Field(80.0, gt=0)
    """memory of a device"""
    tflops: float = Field(312.0, gt=0)
    """dense bf16 peak of a device"""
    mfu: float = Field(0.4, gt=0, le=1)
    """share of that peak which training reaches"""


@dataclass
class PlannedRuns:
    """Models and vocabularies that earlier steps will leave behind, by run directory."""

    shapes: dict[Path, LlamaConfig] = field(default_factory=dict)
    vocabularies: dict[Path, int] = field(default_factory=dict)

    def shape(self, path: Path) -> LlamaConfig | None:
        """Return the architecture of the checkpoint that is, or will be, at `path`; None if nobody
        can tell."""
        if path in self.shapes:
            return self.shapes[path]

        return checkpoint.config_of(path) if checkpoint.exists(path) else None

    def inherit(self, out: Path, source: Path) -> LlamaConfig | None:
        """Note a step that leaves a model of the shape it finds at `source`, and return that."""
        shape = self.shape(source)
        if shape is not None:
            self.shapes[out] = shape

        return shape

    def vocabulary(self, path: Path) -> int | None:
        """Return the size of the vocabulary of the tokenizer that is, or will be, at `path`."""
        if path in self.vocabularies:
            return self.vocabularies[path]

        exists = find_tokenizer(path) if path.is_dir() else path.is_file()
        return checkpoint.open_tokenizer(path).vocab_size if exists else None

    def inherit_vocabulary(self, out: Path, source: Path) -> dict[str, Any]:
        """Note a step that carries on the tokenizer at `source`, and return its size."""
        size = self.vocabulary(source)
        if size is None:
            return {}

        self.vocabularies[out] = size
        return {"vocab_size": size}


# --- stages that train ---
def plan_training(
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
    """Return what a stage takes that trains `towers` on `rows` rows of `length` tokens an optimizer
    step.

    micro_rows: rows a rank computes at a time. whole: bytes of models that every rank holds
    besides. reference: a model that is only read, and is spread over the ranks like those that are
    trained.
    """
    ranks = cluster.ranks or 1
    frozen = settings.frozen_layers
    parameters = sum(tower.parameters for tower in towers)
    trained = sum(tower.count_trained(frozen) for tower in towers)

    def list_parts(count: int) -> dict[str, float]:
        """Return the bytes of a rank, of so many."""
        spread = is_sharded(settings, count)
        share = count if spread else 1
        micro = min(micro_rows, -(-rows // count))
        parts = {"weights_and_optimizer": (4 * parameters + 12 * trained) / share}
        if reference is not None:
            size = 4 if spread else size_of(settings.precision)
            parts["reference"] = size * reference.parameters() / share

        return {
            **parts,
            "gathered": transient_bytes(towers, settings, count),
            "activations": activations(towers, settings, micro, length, packed, spread),
            "whole_models": whole,
        }

    tokens = rows * length
    flops = tokens * sum(
        flops_per_token(tower.shape, length, tower.scalar, frozen) for tower in towers
    )
    unknown = "known when the data is read"
    return {
        "parameters": parameters,
        "on_a_cpu": _name_paths([tower.shape for tower in towers]),
        "ranks": ranks,
        "steps": steps or unknown,
        "tokens_per_step": tokens,
        "tokens": tokens * steps if steps else unknown,
        "micro_batches_per_step": math.ceil(math.ceil(rows / ranks) / micro_rows),
        **_plan_time(flops, steps, cluster),
        **_plan_memory(list_parts(ranks), cluster, _count_ranks(list_parts, cluster, settings)),
    }


def _plan_time(flops: float, steps: int | None, cluster: Cluster) -> dict[str, Any]:
    hours = flops / (cluster.mfu * cluster.tflops * 1e12) / 3600
    if steps is None:
        return {"flops_per_step": _round(flops), "gpu_hours_per_step": _round(hours)}

    return {"flops": _round(flops * steps), "gpu_hours": _round(hours * steps)}


def _count_ranks(
    list_parts: Callable[[int], dict[str, float]], cluster: Cluster, settings: Training
) -> int | str:
    """Return the smallest number of ranks that holds a rank's parts."""
    budget = cluster.gib * GIB
    if sum(list_parts(1).values()) <= budget:
        return 1

    spread = list_parts(2)
    states = 2 * (spread.pop("weights_and_optimizer") + spread.pop("reference", 0.0))
    room = budget - sum(spread.values())
    if settings.parallel != "shard" or room <= 0:
        return NONE

    return max(2, math.ceil(states / room))


def _plan_memory(parts: Mapping[str, float], cluster: Cluster, fewest: int | str) -> dict[str, Any]:
    total = sum(parts.values())
    return {
        "memory_per_rank_gib": {**_to_gib(parts), "together": _round(total / GIB)},
        f"fits_{cluster.gib:g}_gib": total <= cluster.gib * GIB,
        "fewest_ranks": fewest,
    }


# --- stages that sample ---
def plan_sampling(
    policies: Sequence[LlamaConfig | None],
    scorers: Sequence[LlamaConfig | None],
    sample: Sample,
    cluster: Cluster,
) -> dict[str, Any]:
    """Return what a stage takes that samples: every rank holds policies and reward models whole.

    Policies that a server samples are not held here.
    """
    known = [shape for shape in policies if shape is not None]
    if len(known) < len(policies):
        return UNKNOWN

    local = known if sample.server is None else []
    weights = sum(shape.parameters() for shape in local)
    caches = [engine_bytes(shape, sample, copied=False) for shape in local]
    parts = {
        "policies": float(size_of(sample.precision) * weights),
        "engine_and_cache": max(caches, default=0.0),
        "reward_models": scorer_bytes(scorers, sample.precision),
    }
    fits = sum(parts.values()) <= cluster.gib * GIB
    return {
        "parameters": known[0].parameters(),
        "on_a_cpu": _name_paths([*known, *filter(None, scorers)]),
        "ranks": cluster.ranks or 1,
        **_plan_memory(parts, cluster, 1 if fits else NONE),
    }


def plan_judging(
    versions: Sequence[LlamaConfig | None],
    judges: Sequence[LlamaConfig | None],
    precision: quantize.WeightPrecision,
    slots: int,
    max_tokens: int,
    cluster: Cluster,
    *,
    whole_context: bool = False,
    looked_at: bool = False,
) -> dict[str, Any]:
    """Return what a stage takes that asks one version after the other and then one judge after the
    other (`answers`): the most that a rank holds at a time is the largest of them.

    whole_context: dialogs are held until they fill the context. looked_at: the attention of
    versions is drawn. On a CPU the engine packs the weights once more for its decoding steps.
    """
    if None in versions or None in judges:
        return UNKNOWN

    products = quantize.compute_precision(precision)
    sample = Sample(max_tokens=max_tokens, slots=slots, precision=products)
    phases: dict[str, dict[str, float]] = {}
    packed = 0.0
    for shape in filter(None, versions):
        columns = shape.max_position_embeddings if whole_context else 2 * max_tokens
        parts = _plan_version(shape, precision, sample, columns)
        packed = max(packed, decoder_bytes(shape, products))
        _keep_largest(phases, "version", parts)

        if looked_at:
            table = 4.0 * 4 * shape.max_position_embeddings**2
            parts = {"weights": parts["weights"], "activations": table}
            _keep_largest(phases, "attention", parts)

    for shape in filter(None, judges):
        activity = forward_bytes(shape, JUDGED_TOKENS, products)
        parts = {"weights": scorer_bytes([shape], products), "activations": activity}
        _keep_largest(phases, "judge", parts)

    if not phases:
        return {}  # servers answer for all versions, and nobody judges

    totals = {name: sum(parts.values()) for name, parts in phases.items()}
    most = max(totals.values())
    on_cpu = max(most, totals.get("version", 0.0) + packed)
    memory: dict[str, Any] = {name: _to_gib(parts, zeros=False) for name, parts in phases.items()}
    fits = most <= cluster.gib * GIB
    return {
        "parameters": max((shape.parameters() for shape in versions if shape), default=0),
        "on_a_cpu": _name_paths(list(filter(None, (*versions, *judges)))),
        "ranks": cluster.ranks or 1,
        "memory_per_rank_gib": {
            **memory,
            "together": _round(most / GIB),
            "together_on_a_cpu": _round(on_cpu / GIB),
        },
        f"fits_{cluster.gib:g}_gib": fits,
        "fewest_ranks": 1 if fits else NONE,
    }


def _plan_version(
    shape: LlamaConfig, precision: quantize.WeightPrecision, sample: Sample, columns: int
) -> dict[str, float]:
    """Return the bytes of a version that answers, with so many tokens in a slot."""
    weights = float(size_of(sample.precision) * shape.parameters())
    prefill = forward_bytes(shape, PREFILL_TOKENS, sample.precision, bare=True)
    return {
        "weights": weights,
        "copies": 0.0 if precision in ("fp32", "bf16") else weights,
        "cache": cache_bytes(shape, sample, columns),
        "activations": max(prefill, draw_bytes(shape, sample.slots)),
    }


def _keep_largest(phases: dict[str, dict[str, float]], name: str, parts: dict[str, float]) -> None:
    """Keep the larger of two phases of one name: they come one after the other."""
    if sum(parts.values()) > sum(phases.get(name, {}).values()):
        phases[name] = parts


def _name_paths(shapes: Sequence[LlamaConfig]) -> str:
    """Return what computes models of these shapes on a CPU."""
    return "; ".join(dict.fromkeys(map(kernel_shapes.describe, shapes)))


# --- recipes ---
def total(plans: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the sum over all steps of a recipe: GPU-hours where they are known, and the steps that
    do not fit."""
    hours, unknown, tight = 0.0, [], {}
    for name, plan in plans.items():
        if "gpu_hours" in plan:
            hours += plan["gpu_hours"]
        elif "memory_per_rank_gib" in plan:
            unknown.append(name)

        if any(key.startswith("fits_") and not fits for key, fits in plan.items()):
            memory = plan["memory_per_rank_gib"]["together"]
            tight[name] = {"gib": memory, "fewest_ranks": plan["fewest_ranks"]}

    return {"gpu_hours": _round(hours), "gpu_hours_unknown_of": unknown, "do_not_fit": tight}


def _to_gib(parts: Mapping[str, float], zeros: bool = True) -> dict[str, float]:
    return {name: _round(value / GIB) for name, value in parts.items() if value or zeros}


def _round(value: float) -> float:
    """Round to three digits: the estimates have no more."""
    return float(f"{value:.3g}")
