"""Cautions about runs that would teach next to nothing: each is one line, with the cure.

The paper's batches are made for the paper's data: 64 rows of 4,096 tokens, or 512 pairs, turn a few
hundred records of one's own into two updates.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from llama2.train.loop import Plan

FEW_UPDATES = 50
"""an update moves a weight by about the learning rate: fewer than these hardly move it"""


def warn_of_length(
    asked: Plan, steps: int, items: int, what: str, batch_size: int, epochs: int
) -> Iterator[str]:
    """Caution about a run whose data allows `steps` updates: `epochs` passes over `items` rows or
    pairs (`what`)."""
    limit = asked.max_steps
    if limit is not None and limit > steps:
        needed = math.ceil(limit / math.ceil(items / batch_size))
        yield (
            f"max_steps {limit:,} is more than the {_count(steps, 'update')} of "
            f"{_count(epochs, 'epoch')}: training and its schedule end there; --epochs {needed} "
            "would be enough"
        )

    if steps < FEW_UPDATES and (limit is None or limit > steps):
        yield describe_few_updates(
            steps,
            f"{_count(items, what)} in {_count(epochs, 'epoch')}",
            _suggest_updates(items, epochs),
        )


def describe_few_updates(steps: int, source: str, cure: str) -> str:
    """Return the caution that `steps` updates are few, and what would make more of the same
    data."""
    return f"{_count(steps, 'update')} from {source}: fewer than {FEW_UPDATES} teach little; {cure}"


def warn_of_schedule(plan: Plan) -> Iterator[str]:
    """Caution where warm-up is longer than the run, so that the learning rate never reaches its
    peak."""
    warmup, steps = plan.warmup_steps or 0, plan.max_steps
    if steps is not None and warmup > steps:
        yield (
            f"the learning rate rises to {steps / warmup:.0%} of its peak and no further: warm-up "
            f"takes {_count(warmup, 'update')}, the run has {steps:,}; lower "
            "--training.plan.warmup-steps"
        )


def _suggest_updates(items: int, epochs: int) -> str:
    """Suggest the largest batch with which `epochs` passes make enough updates, or a batch of one
    and more passes."""
    in_a_pass = math.ceil(FEW_UPDATES / epochs)
    if items >= in_a_pass:
        batch_size = max(
            size for size in range(1, items + 1) if math.ceil(items / size) >= in_a_pass
        )
        return f"--batch-size {batch_size} would give {epochs * math.ceil(items / batch_size)}"

    passes = math.ceil(FEW_UPDATES / items)
    return f"--batch-size 1 --epochs {passes} would give {passes * items}"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
