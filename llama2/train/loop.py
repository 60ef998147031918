"""The one training loop. Pretraining, SFT, reward models and PPO differ only in source and
objective.

An objective returns *summed* loss, weight and metrics. Gradients of all micro-batches and ranks are
summed and divided once by the global weight, so the split into micro-batches and ranks changes
nothing but rounding. This file holds the only backward pass of the package.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from pydantic import Field
from torch import Tensor, nn

from llama2 import devices
from llama2.batches import Batch, count_tokens, move
from llama2.config import Config
from llama2.errors import UserError
from llama2.runs import Stopped
from llama2.train import optim, parallel
from llama2.train.learner import Learner


@dataclass
class Loss:
    """The result of an objective for one micro-batch, everything summed.

    `total` is differentiated; `weight` counts what it sums over (trained tokens, pairs). A metric
    is divided by `weight` when reported, or by the metric `<name>/weight` where there is one. Every
    micro-batch of every rank must have the same metrics.
    """

    total: Tensor
    weight: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


Objective = Callable[[nn.Module, Batch], Loss]


class BatchSource(Protocol):
    """A source of batches. The state after a step must lead to the same later batches."""

    def __next__(self) -> list[Batch]:
        """Return the micro-batches of one optimizer step on this rank; StopIteration ends training.

        Ranks may hold different numbers of micro-batches, except where the model is sharded.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the place in the data."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a place that `state_dict` returned."""
        ...


class Plan(Config):
    """Length of training, its learning rate, and the rhythm of validations and checkpoints."""

    max_steps: int | None = Field(None, ge=1)
    """optimizer steps; without it training ends with its source"""
    schedule: optim.Schedule = "cosine"
    warmup_steps: int | None = Field(None, ge=0)
    """updates until the peak; none unless given (but see `reward`)"""
    total_steps: int | None = Field(None, ge=1)
    """where the cosine ends; max_steps unless given"""
    min_ratio: float = Field(0.1, ge=0, le=1)
    """the last learning rate as a share of the peak"""
    clip: float = Field(1.0, gt=0)
    """largest norm of the mean gradient, of each part of the model that is clipped apart"""
    log_every: int = Field(10, ge=1)
    validate_every: int = Field(0, ge=0)
    """steps between validations; 0: only at the end"""
    save_every: int = Field(0, ge=0)
    """steps between checkpoints; 0: only when stopped and at the end"""
    keep: int = Field(2, ge=1)
    """checkpoints to keep"""

    @property
    def total(self) -> int | None:
        """The step where the cosine ends."""
        return self.max_steps if self.total_steps is None else self.total_steps

    def scale_rate(self, step: int) -> float:
        """Return the learning rate of update `step` (0-based) as a share of its peak."""
        return optim.scale_rate(
            step, self.schedule, self.warmup_steps or 0, self.total, self.min_ratio
        )

    def check(self) -> None:
        """Raise `UserError` where schedule and length do not fit."""
        total = self.total
        if self.schedule == "cosine" and total is None:
            raise UserError(
                "a cosine schedule needs max_steps or total_steps", "set one, or schedule: constant"
            )
        if self.schedule == "cosine" and total is not None and total <= (self.warmup_steps or 0):
            raise UserError(
                f"warmup_steps {self.warmup_steps} leaves nothing of a schedule of {total} steps",
                "lower --training.plan.warmup-steps",
            )


@dataclass(frozen=True)
class Report:
    """One optimizer step, summed over micro-batches and ranks."""

    step: int
    """steps done, this one included"""
    sums: dict[str, float]
    """loss (as train/loss) and metrics"""
    weight: float
    tokens: float
    """real ones: padding is none"""
    trained: float
    """tokens that carried loss"""
    seconds: float
    gradient_norms: dict[str, float]
    """of the mean gradient of each part that is clipped apart, before clipping"""
    learning_rate: float

    @property
    def gradient_norm(self) -> float:
        """The norm of the whole mean gradient, before clipping."""
        return math.hypot(*self.gradient_norms.values())


def average(sums: Mapping[str, float], weight: float) -> dict[str, float]:
    """Divide each sum by its weight (`<name>/weight`, else `weight`), and leave out metrics that
    nothing was counted for."""
    weights = {
        name: sums.get(f"{name}/weight", weight) for name in sums if not name.endswith("/weight")
    }
    return {name: sums[name] / weights[name] for name in weights if weights[name]}


class Hook:
    """Watches training. Override what is needed; every rank calls every hook."""

    def on_start(self, training: TrainingState) -> None:
        """Act before the first step; a checkpoint is restored here."""

    def on_step(self, training: TrainingState, report: Report) -> None:
        """Act after each update."""

    def on_log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Act when any hook publishes metrics."""

    def on_boundary(self, training: TrainingState) -> None:
        """Act when every hook has seen the step, or the end: the state is whole and may be
        saved."""

    def on_end(self, training: TrainingState) -> None:
        """Act after the last step."""

    def close(self) -> None:
        """Let go of what is held; also called after an error."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run must know."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""


@dataclass
class TrainingState:
    """A training run as hooks see it, and what they may ask of it."""

    learner: Learner
    source: BatchSource
    plan: Plan
    hooks: Sequence[Hook]
    stop_requested: bool = False
    """this rank was asked to stop"""
    interrupted: bool = False
    """... by Ctrl-C"""
    stop: bool = False
    """some rank was asked: all save at this boundary and raise `Stopped`"""
    finish: bool = False
    """end normally after this step; a hook must set it on all ranks alike"""
    ended: bool = False
    """the last step is done and every hook has seen the end"""
    checkpoint: Path | None = None
    """the newest complete checkpoint"""
    names: tuple[str, ...] = ()
    """the objective's metrics, in the order in which ranks sum them"""
    agreed: bool = False
    """all ranks know `names`"""

    def log(self, metrics: Mapping[str, float]) -> None:
        """Publish metrics of the current step to all hooks."""
        for hook in self.hooks:
            hook.on_log(self.learner.step, metrics)


def fit(
    learner: Learner,
    source: BatchSource,
    objective: Objective,
    plan: Plan,
    hooks: Sequence[Hook] = (),
) -> None:
    """Train until `plan.max_steps`, the end of the source or a hook's request.

    Raises `Stopped` when asked to stop, `UserError` when loss or gradient is not finite (the update
    is not made).
    """
    plan.check()
    training = TrainingState(learner, source, plan, hooks)
    was_training = learner.model.training

    try:
        for hook in hooks:
            hook.on_start(training)

        while not training.finish and (plan.max_steps is None or learner.step < plan.max_steps):
            begin = time.perf_counter()
            batches = _agree(learner, next(source, None))
            if batches is None:
                break

            learner.model.train()
            report = _take_step(training, objective, batches, begin)
            for hook in hooks:
                hook.on_step(training, report)

            if not training.stop and (training.finish or learner.step == plan.max_steps):
                break

            _boundary(training)
            if training.stop:
                raise Stopped(learner.step, training.checkpoint, training.interrupted)

        for hook in hooks:
            hook.on_end(training)

        training.ended = True
        _boundary(training)
    finally:
        learner.model.train(was_training)
        for hook in hooks:
            hook.close()


def _boundary(training: TrainingState) -> None:
    for hook in training.hooks:
        hook.on_boundary(training)


def _agree(learner: Learner, batches: list[Batch] | None) -> list[Batch] | None:
    """Return None on every rank as soon as one rank's source has ended: the others would wait for
    it for ever."""
    ranks = learner.ranks
    if ranks.size == 1:
        return batches

    count = -1 if batches is None else len(batches)
    ended, total, squares = ranks.all_sum(
        torch.tensor([count < 0, count, count * count], dtype=torch.int64, device=ranks.device)
    ).tolist()
    if ended:
        return None
    if parallel.is_sharded(learner.model) and total * total != squares * ranks.data.size:
        raise ValueError("a sharded model needs the same number of micro-batches on every rank")

    return batches


def _take_step(
    training: TrainingState, objective: Objective, batches: Iterable[Batch], begin: float
) -> Report:
    """Make one update from the micro-batches of one step."""
    learner, plan = training.learner, training.plan
    rate = plan.scale_rate(learner.step)
    for group in learner.optimizer.param_groups:
        group["lr"] = group["peak"] * rate

    sums, weight, tokens, trained = _differentiate(training, objective, batches)
    norms = _update(training, sums["train/loss"], weight)
    learner.step += 1
    learner.tokens += round(tokens)
    learner.trained += round(trained)

    return Report(
        learner.step,
        sums,
        weight,
        tokens,
        trained,
        time.perf_counter() - begin,
        norms,
        learner.optimizer.param_groups[0]["lr"],
    )


def _differentiate(
    training: TrainingState, objective: Objective, batches: Iterable[Batch]
) -> tuple[dict[str, float], float, float, float]:
    """Compute the gradients of the loss, summed over micro-batches and ranks; return the sums of
    metrics, weight, tokens and trained tokens likewise.

    A request to stop rides on the same collective, so that all ranks act on it at the same step.
    """
    learner, ranks = training.learner, training.learner.ranks
    learner.optimizer.zero_grad(set_to_none=True)
    rows: list[Tensor] = []
    tokens = trained = 0

    for batch in batches:
        read, under_loss = count_tokens(batch)
        tokens, trained = tokens + read, trained + under_loss
        with devices.autocast(ranks.device, learner.precision):
            loss = objective(learner.forward, move(batch, ranks.device))

        loss.total.backward()  # type: ignore[no-untyped-call]
        names = tuple(sorted(loss.metrics))
        training.names = training.names or names

        if names != training.names:
            raise ValueError(
                f"an objective must return the same metrics every time: {names}, "
                f"not {training.names}"
            )

        values = [loss.total, loss.weight, *(loss.metrics[name] for name in names)]
        numbers = [value.detach().double().reshape(()).to(ranks.device) for value in values]
        rows.append(torch.stack(numbers))

    parallel.sum_gradients(learner.model, ranks)
    if not training.agreed:  # a rank without micro-batches learns the metrics from the others
        training.names, training.agreed = max(ranks.gather([training.names]), key=len), True

    kind: dict[str, Any] = {"dtype": torch.float64, "device": ranks.device}
    counts = torch.tensor([training.stop_requested, tokens, trained], **kind)
    sums = torch.stack(rows).sum(0) if rows else torch.zeros(2 + len(training.names), **kind)
    stop, all_tokens, all_trained, total, weight, *metrics = ranks.all_sum(
        torch.cat([counts, sums])
    ).tolist()
    training.stop = stop > 0

    return (
        {"train/loss": total, **dict(zip(training.names, metrics))},
        weight,
        all_tokens,
        all_trained,
    )


def _update(training: TrainingState, total: float, weight: float) -> dict[str, float]:
    """Divide the summed gradients by the global weight, clip each part, and step; return the norms
    of the mean gradients.

    Division and clipping are one multiplication. A step in which nothing was counted changes
    nothing.
    """
    learner, limit = training.learner, training.plan.clip
    gradients = {name: _gradients(part) for name, part in learner.parts.items()}
    norms = {name: parallel.measure_norm(part) for name, part in gradients.items()}

    if not all(map(math.isfinite, (total, *norms.values()))):
        raise _not_finite(training, total, norms, weight)
    if weight == 0:
        return dict.fromkeys(norms, 0.0)

    norms = {name: norm / weight for name, norm in norms.items()}
    for name, part in gradients.items():
        factor = limit / norms[name] if norms[name] > limit else 1.0
        if part:
            torch._foreach_mul_(part, factor / weight)

    learner.optimizer.step()
    return norms


def _gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def _not_finite(
    training: TrainingState, total: float, norms: Mapping[str, float], weight: float
) -> UserError:
    """Return the error that says which number went wrong at this step, in which part of the model,
    and what is left to go on from."""
    learner, count = training.learner, weight or 1.0
    what = "loss"
    if math.isfinite(total):
        part = next(name for name, norm in norms.items() if not math.isfinite(norm))
        what = f"gradient norm of the {part.rstrip('.')}" if part else "gradient norm"

    rest = "no checkpoint was taken yet"
    if training.checkpoint:
        rest = f"the checkpoint {training.checkpoint} is kept"

    return UserError(
        f"step {learner.step + 1}: the {what} is not finite (loss {total / count:.4g}, "
        f"gradient norm {math.hypot(*norms.values()) / count:.4g}, "
        f"learning rate {learner.optimizer.param_groups[0]['lr']:.3g})",
        f"lower learning_rate or lengthen warmup_steps, and look at the data of this step; {rest}",
    )
