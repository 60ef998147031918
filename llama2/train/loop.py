"""The one training loop. Pretraining, SFT, reward models and PPO differ only in source and
objective.

An objective returns *summed* loss, weight and metrics. Gradients of all micro-batches and ranks are
summed and divided once by the global weight, so the split into micro-batches and ranks changes
nothing but rounding. This file holds the only backward pass of the package.
"""

from __future__ import annotations

import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from pydantic import Field
from torch import Tensor, nn

from llama2 import devices, private_folders
from llama2.config import Config
from llama2.devices import Precision
from llama2.errors import UserError
from llama2.ranks import Ranks
from llama2.runs import Stopped
from llama2.train import optim, parallel

Batch = dict[str, Tensor]


@dataclass
class Loss:
    """What an objective returns for one micro-batch, everything summed.

    `total` is differentiated; `weight` counts what it sums over (trained tokens, pairs). A metric
    is divided by `weight` when reported, or by the metric `<name>/weight` where there is one. Every
    micro-batch of every rank must have the same metrics.
    """

    total: Tensor
    weight: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


Objective = Callable[[nn.Module, Batch], Loss]


class Source(Protocol):
    """Where batches come from. The state after a step must lead to the same later batches."""

    def __next__(self) -> list[Batch]:
        """The micro-batches of one optimizer step on this rank; StopIteration ends training.

        Ranks may hold different numbers of micro-batches, except where the model is sharded.
        """
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Plan(Config):
    """How long to train, at which rate, and how often to look and to save."""

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
        """Where the cosine ends."""
        return self.max_steps if self.total_steps is None else self.total_steps

    def factor(self, step: int) -> float:
        """The learning rate of update `step` (0-based) as a share of its peak."""
        return optim.factor(step, self.schedule, self.warmup_steps or 0, self.total, self.min_ratio)

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


class Learner:
    """A model and its optimizer, ready to be fitted on `ranks`. Apply `parallel.replicate` or
    `parallel.shard` to the model first.

    `rates` gives parts of the model (name prefixes) peak learning rates of their own. `apart` names
    parts whose gradients are clipped each by its own norm; what no prefix matches is one more part,
    called "". With `compile` the objective sees the compiled model; without a C++ compiler it stays
    eager and says so.

    `tokens` counts the real tokens read so far, over all ranks, and `trained` those of them that
    carried loss.
    """

    def __init__(
        self,
        model: nn.Module,
        ranks: Ranks,
        optimizer: optim.AdamW | None = None,
        *,
        rates: Mapping[str, float] | None = None,
        apart: Sequence[str] = (),
        precision: Precision = "fp32",
        compile: bool = False,
    ) -> None:
        self.model, self.ranks, self.precision = model, ranks, precision
        self.step = self.tokens = self.trained = 0
        self.optimizer = optim.adamw(model, optimizer or optim.AdamW(), rates)
        self.parts = optim.parts(model, apart)
        self.forward: nn.Module = _compiled(model, ranks) if compile else model

    def state_dict(self) -> dict[str, Any]:
        """Model, optimizer and counts; every rank calls it, the tensors of a sharded model arrive
        on rank 0."""
        model, optimizer = parallel.full_state(self.model, self.optimizer)
        return {
            "model": model,
            "optimizer": optimizer,
            "step": self.step,
            "tokens": self.tokens,
            "trained": self.trained,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        parallel.load_full_state(self.model, self.optimizer, state["model"], state["optimizer"])
        self.step, self.tokens, self.trained = (
            state["step"],
            state.get("tokens", 0),
            state.get("trained", 0),
        )


def _compiled(model: nn.Module, ranks: Ranks) -> nn.Module:
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++")):
        if ranks.is_main:
            print(
                "no C++ compiler found: training without torch.compile (install g++ for more speed)",
                file=sys.stderr,
            )

        return model

    # What it compiles is loaded again later: from a folder of our own, not from one in /tmp that
    # anybody can guess.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(private_folders.folder() / "inductor"))
    compiled: nn.Module = torch.compile(model)  # type: ignore[assignment]
    return compiled


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
        """Of the whole mean gradient, before clipping."""
        return math.hypot(*self.gradient_norms.values())


def means(sums: Mapping[str, float], weight: float) -> dict[str, float]:
    """Each sum over its weight (`<name>/weight`, else `weight`); metrics nothing was counted for
    are left out."""
    weights = {
        name: sums.get(f"{name}/weight", weight) for name in sums if not name.endswith("/weight")
    }
    return {name: sums[name] / weights[name] for name in weights if weights[name]}


class Hook:
    """Watches training. Override what is needed; every rank calls every hook."""

    def on_start(self, training: Training) -> None:
        """Before the first step; a checkpoint is restored here."""

    def on_step(self, training: Training, report: Report) -> None:
        """After each update."""

    def on_log(self, step: int, metrics: Mapping[str, float]) -> None:
        """When any hook publishes metrics."""

    def on_boundary(self, training: Training) -> None:
        """After every hook has seen the step, or the end: the state is whole and may be saved."""

    def on_end(self, training: Training) -> None:
        """After the last step."""

    def close(self) -> None:
        """Always called, also after an error."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""


@dataclass
class Training:
    """What hooks see and may ask of the loop."""

    learner: Learner
    source: Source
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
    learner: Learner, source: Source, objective: Objective, plan: Plan, hooks: Sequence[Hook] = ()
) -> None:
    """Train until `plan.max_steps`, the end of the source or a hook's request.

    Raises `Stopped` when asked to stop, `UserError` when loss or gradient is not finite (the update
    is not made).
    """
    plan.check()
    training = Training(learner, source, plan, hooks)
    was_training = learner.model.training

    try:
        for hook in hooks:
            hook.on_start(training)

        while not training.finish and (plan.max_steps is None or learner.step < plan.max_steps):
            begin = time.perf_counter()
            batches = _agreed(learner, next(source, None))
            if batches is None:
                break

            learner.model.train()
            report = _step(training, objective, batches, begin)
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


def _boundary(training: Training) -> None:
    for hook in training.hooks:
        hook.on_boundary(training)


def _agreed(learner: Learner, batches: list[Batch] | None) -> list[Batch] | None:
    """None on every rank as soon as one rank's source has ended: the others would wait for it for
    ever."""
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


def _step(
    training: Training, objective: Objective, batches: Iterable[Batch], begin: float
) -> Report:
    """One update from the micro-batches of one step."""
    learner, plan = training.learner, training.plan
    rate = plan.factor(learner.step)
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


def count_tokens(batch: Batch) -> tuple[int, int]:
    """Real tokens of a micro-batch, and how many carry loss.

    `read_B` says how many tokens of each row are real; without it all are. `weights_BT` marks the
    targets under loss; without it a row is scored at its last token.
    """
    if "tokens_BT" not in batch:
        return 0, 0

    rows, length = batch["tokens_BT"].shape
    read_B = batch.get("read_B", torch.full((rows,), length))
    under_loss = batch.get("weights_BT", read_B)

    return int(read_B.sum()), int((under_loss > 0).sum())


def _differentiate(
    training: Training, objective: Objective, batches: Iterable[Batch]
) -> tuple[dict[str, float], float, float, float]:
    """Gradients of the loss summed over micro-batches and ranks; sums of metrics, weight and tokens
    likewise.

    A request to stop rides on the same collective, so that all ranks act on it at the same step.
    """
    learner, ranks = training.learner, training.learner.ranks
    learner.optimizer.zero_grad(set_to_none=True)
    rows: list[Tensor] = []
    tokens = trained = 0

    for batch in batches:
        read, under_loss = count_tokens(batch)
        tokens, trained = tokens + read, trained + under_loss
        batch = {name: tensor.to(ranks.device, non_blocking=True) for name, tensor in batch.items()}

        with devices.autocast(ranks.device, learner.precision):
            loss = objective(learner.forward, batch)

        loss.total.backward()  # type: ignore[no-untyped-call]
        names = tuple(sorted(loss.metrics))
        training.names = training.names or names

        if names != training.names:
            raise ValueError(
                f"an objective must return the same metrics every time: {names}, not {training.names}"
            )

        rows.append(
            torch.stack(
                [
                    value.detach().double().reshape(()).to(ranks.device)
                    for value in (loss.total, loss.weight, *(loss.metrics[name] for name in names))
                ]
            )
        )

    parallel.sum_gradients(learner.model, ranks)
    if not training.agreed:  # a rank without micro-batches learns the metrics from the others
        training.names, training.agreed = max(ranks.gather([training.names]), key=len), True

    own = (
        torch.stack(rows).sum(0)
        if rows
        else torch.zeros(2 + len(training.names), dtype=torch.float64, device=ranks.device)
    )
    extra = torch.tensor(
        [training.stop_requested, tokens, trained], dtype=torch.float64, device=ranks.device
    )
    stop, all_tokens, all_trained, total, weight, *values = ranks.all_sum(
        torch.cat([extra, own])
    ).tolist()
    training.stop = stop > 0

    return (
        {"train/loss": total, **dict(zip(training.names, values))},
        weight,
        all_tokens,
        all_trained,
    )


def _update(training: Training, total: float, weight: float) -> dict[str, float]:
    """Divide the summed gradients by the global weight, clip each part, and step; returns the mean
    gradients' norms.

    Division and clipping are one multiplication. A step in which nothing was counted changes
    nothing.
    """
    learner, limit = training.learner, training.plan.clip
    gradients = {
        name: [p.grad for p in part if p.grad is not None] for name, part in learner.parts.items()
    }
    norms = {name: parallel.gradient_norm(part) for name, part in gradients.items()}

    if not all(map(math.isfinite, (total, *norms.values()))):
        raise _not_finite(training, total, norms, weight)
    if weight == 0:
        return dict.fromkeys(norms, 0.0)

    norms = {name: norm / weight for name, norm in norms.items()}
    for name, part in gradients.items():
        if part:
            torch._foreach_mul_(
                part, (limit / norms[name] if norms[name] > limit else 1.0) / weight
            )

    learner.optimizer.step()
    return norms


def _not_finite(
    training: Training, total: float, norms: Mapping[str, float], weight: float
) -> UserError:
    """Which number went wrong at this step, in which part of the model, and what is left to go on
    from."""
    learner, count = training.learner, weight or 1.0
    what, where = "loss", ""
    if math.isfinite(total):
        name = next(name for name, norm in norms.items() if not math.isfinite(norm))
        what, where = "gradient norm", f" of the {name.rstrip('.')}" if name else ""

    kept = (
        f"the checkpoint {training.checkpoint} is kept"
        if training.checkpoint
        else "no checkpoint was taken yet"
    )
    return UserError(
        f"step {learner.step + 1}: the {what}{where} is not finite (loss {total / count:.4g}, gradient norm "
        f"{math.hypot(*norms.values()) / count:.4g}, learning rate {learner.optimizer.param_groups[0]['lr']:.3g})",
        f"lower learning_rate or lengthen warmup_steps, and look at the data of this step; {kept}",
    )
