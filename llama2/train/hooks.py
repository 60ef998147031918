"""Hooks around training: metrics, progress, validation, checkpoints, signals.

None of it touches the mathematics: a hook sees reports and asks the loop to finish or stop.
Validation runs beside the random generators, so a run trains alike with and without it.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import nn

from llama2 import devices, interrupts
from llama2.errors import explain_missing_extra
from llama2.ranks import Ranks
from llama2.terminal_text import format_clock
from llama2.train import state
from llama2.train.loop import Hook, Report, TrainingState, average

Metrics = Mapping[str, float]
Write = Callable[[int, Metrics], None]
Derive = Callable[[Metrics], Metrics]
SECONDS_BETWEEN_LINES = 10.0


class Window:
    """Sums over the steps since the last look."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.weight = self.tokens = self.seconds = 0.0

    def add(self, report: Report) -> None:
        """Count one more step."""
        for name, value in report.sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

        self.weight += report.weight
        self.tokens += report.tokens
        self.seconds += report.seconds

    def average(self) -> dict[str, float]:
        """Return the mean of each metric."""
        return average(self.sums, self.weight)

    def measure_speed(self, flops_per_token: float, peak: float, ranks: int) -> dict[str, float]:
        """Return real tokens a second over all ranks and, where a peak is known, the share of it
        that they take (MFU).

        What is computed faster than the measured peak shows that the peak is at least that: 100 %
        is the most.
        """
        if not self.tokens or not self.seconds:
            return {}

        rate = self.tokens / self.seconds
        share = {"perf/mfu": min(rate * flops_per_token / (peak * ranks), 1.0)} if peak else {}
        return {"perf/tokens_per_second": rate, **share}


def find_peak(flops_per_token: float, training: TrainingState) -> float:
    """Return the device's peak in FLOP/s, 0 where MFU cannot be told from it."""
    device = training.learner.ranks.device
    if not flops_per_token or not devices.is_exclusive(device):
        return 0.0

    return devices.measure_peak(device, training.learner.precision)


class Log(Hook):
    """Publish means over every `plan.log_every` steps and write all published metrics through
    `write(step, metrics)`.

    `flops_per_token` (forward and backward) adds MFU on a GPU; each of `derive` adds what follows
    from the means.
    """

    def __init__(
        self, write: Write, flops_per_token: float = 0.0, derive: Sequence[Derive] = ()
    ) -> None:
        self.write, self.flops_per_token, self.derive = write, flops_per_token, tuple(derive)
        self.window, self.peak = Window(), 0.0
        self.pending: Report | None = None

    def on_start(self, training: TrainingState) -> None:
        """Measure the peak that MFU is told from."""
        self.peak = find_peak(self.flops_per_token, training)

    def on_step(self, training: TrainingState, report: Report) -> None:
        """Count the step; publish every `plan.log_every` of them."""
        self.window.add(report)
        self.pending = report
        if report.step % training.plan.log_every == 0:
            self._publish(training, report)

    def on_end(self, training: TrainingState) -> None:
        """Publish what is left."""
        if self.pending is not None:
            self._publish(training, self.pending)

    def _publish(self, training: TrainingState, report: Report) -> None:
        averages = self.window.average()
        metrics = {
            **averages,
            "train/lr": report.learning_rate,
            "train/grad_norm": report.gradient_norm,
            **self.window.measure_speed(
                self.flops_per_token, self.peak, training.learner.ranks.size
            ),
        }
        for derive in self.derive:
            metrics.update(derive(averages))

        self.window, self.pending = Window(), None
        training.log(metrics)

    def on_log(self, step: int, metrics: Metrics) -> None:
        """Write the metrics."""
        self.write(step, metrics)

    def state_dict(self) -> dict[str, Any]:
        """Return the sums since the last publication."""
        return dict(vars(self.window))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        vars(self.window).update(state)


class TensorBoard(Hook):
    """Write all published metrics as TensorBoard events (extra `tensorboard`)."""

    def __init__(self, directory: Path, ranks: Ranks) -> None:
        self.writer: Any = None
        if ranks.is_main:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise explain_missing_extra("tensorboard", "tensorboard") from None

            self.writer = SummaryWriter(directory)

    def on_log(self, step: int, metrics: Metrics) -> None:
        """Write each metric."""
        if self.writer is not None:
            for name, value in metrics.items():
                self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Close the file of events."""
        if self.writer is not None:
            self.writer.close()


class ProgressBar(Hook):
    """A bar with ETA, loss, tokens/s and, on a GPU, MFU on standard error; a line every ten seconds
    where that is no terminal."""

    def __init__(self, title: str, flops_per_token: float = 0.0) -> None:
        self.title, self.flops_per_token, self.peak = title, flops_per_token, 0.0
        self.window, self.begin, self.first, self.printed = Window(), 0.0, 0, 0.0
        self.bar: Progress | None = None

    def on_start(self, training: TrainingState) -> None:
        """Show the bar at the step that training begins with."""
        self.begin = self.printed = time.monotonic()
        self.peak = find_peak(self.flops_per_token, training)
        if training.learner.ranks.is_main and sys.stderr.isatty():
            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[text]}"),
                console=Console(stderr=True),
            )
            self.bar.start()
            self.bar.add_task(
                self.title, total=training.plan.max_steps, completed=training.learner.step, text=""
            )

    def on_step(self, training: TrainingState, report: Report) -> None:
        """Show the step, if the last one shown was long enough ago."""
        self.first = self.first or report.step
        self.window.add(report)
        now = time.monotonic()
        wait = 0.25 if self.bar else SECONDS_BETWEEN_LINES

        if training.learner.ranks.is_main and (
            now - self.printed >= wait or report.step == training.plan.max_steps
        ):
            self._show(training, report, now)
            self.printed, self.window = now, Window()

    def _show(self, training: TrainingState, report: Report, now: float) -> None:
        total = training.plan.max_steps
        speed = self.window.measure_speed(
            self.flops_per_token, self.peak, training.learner.ranks.size
        )
        parts = [f"loss {self.window.average().get('train/loss', 0.0):.4f}"]

        if total is not None:  # by the wall clock, validations and checkpoints included
            seconds_per_step = (now - self.begin) / (report.step - self.first + 1)
            parts.insert(0, f"ETA {format_clock((total - report.step) * seconds_per_step)}")

        if speed:
            parts.append(f"{speed['perf/tokens_per_second']:,.0f} tokens/s")

        if "perf/mfu" in speed:
            parts.append(f"MFU {speed['perf/mfu']:.0%}")

        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=report.step, text="  ".join(parts))
        else:
            place = f"{report.step}/{total}" if total is not None else str(report.step)
            print(f"{self.title} {place}: {', '.join(parts)}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Take the bar away."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


class Validate(Hook):
    """Publish `evaluate(model)` every `plan.validate_every` steps and at the end; keep the best,
    stop when it is past.

    `evaluate` runs on every rank, in evaluation mode and without gradients. `monitor` names the
    metric to improve (`higher` says which way); `keep_best()` is called on every rank whenever it
    has; after `patience` validations without improvement training finishes (0: never).
    """

    def __init__(
        self,
        evaluate: Callable[[nn.Module], Metrics],
        monitor: str = "",
        *,
        higher: bool = False,
        patience: int = 0,
        keep_best: Callable[[], None] | None = None,
    ) -> None:
        self.evaluate, self.monitor, self.higher = evaluate, monitor, higher
        self.patience, self.keep_best = patience, keep_best
        self.best: float | None = None
        self.best_step = self.last_step = self.failures = 0

    def on_step(self, training: TrainingState, report: Report) -> None:
        """Validate at every interval."""
        every = training.plan.validate_every
        if every and report.step % every == 0:
            self._validate(training)

    def on_end(self, training: TrainingState) -> None:
        """Validate at the end, unless the last step was."""
        if self.last_step != training.learner.step:
            self._validate(training)

    def _validate(self, training: TrainingState) -> None:
        model, ranks = training.learner.model, training.learner.ranks
        before = state.get_random_state(ranks.device)
        was_training = model.training
        model.eval()

        try:
            with torch.no_grad(), devices.autocast(ranks.device, training.learner.precision):
                # one rank's word: all must decide alike
                metrics = ranks.broadcast(dict(self.evaluate(model)))
        finally:
            model.train(was_training)
            state.set_random_state(before, ranks.device)

        self.last_step = training.learner.step
        if self.monitor:
            self._compare(training, metrics[self.monitor])

        training.log(metrics)

    def _compare(self, training: TrainingState, value: float) -> None:
        if self.best is None or (value > self.best if self.higher else value < self.best):
            self.best, self.best_step, self.failures = value, training.learner.step, 0
            if self.keep_best is not None:
                self.keep_best()

            return

        self.failures += 1
        if self.patience and self.failures >= self.patience:
            training.finish = True

    def state_dict(self) -> dict[str, Any]:
        """Return the best value and how long ago it was."""
        return {
            "best": self.best,
            "best_step": self.best_step,
            "last_step": self.last_step,
            "failures": self.failures,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        vars(self).update(state)


class Checkpoint(Hook):
    """Resume from the newest checkpoint of the run; save every `plan.save_every` steps, when
    stopped and at the end.

    `on_resume(step)` is told where training goes on, before it does.
    """

    def __init__(
        self,
        run: Path,
        save_model: state.SaveModel | None = None,
        on_resume: Callable[[int], None] | None = None,
    ) -> None:
        self.run, self.save_model, self.on_resume = run, save_model, on_resume

    def on_start(self, training: TrainingState) -> None:
        """Restore the newest checkpoint, if there is one."""
        ranks = training.learner.ranks
        newest = state.find_newest_whole(self.run, ranks)
        if newest is not None:
            state.restore(training, newest)
            if ranks.is_main and state.has_lost_metrics(self.run, newest):
                print(
                    f"{self.run}/metrics.jsonl: damaged: lines logged before step "
                    f"{training.learner.step} are lost, and the report's curves lack them",
                    file=sys.stderr,
                )

            if self.on_resume is not None:
                self.on_resume(training.learner.step)

    def on_boundary(self, training: TrainingState) -> None:
        """Save at every interval, when stopped and at the end."""
        every = training.plan.save_every
        if training.stop or training.ended or (every and training.learner.step % every == 0):
            state.save(training, self.run, self.save_model, training.plan.keep)


class Signals(Hook):
    """SIGTERM, SIGUSR1 (a scheduler's warning), SIGHUP (a closed terminal) and Ctrl-C end training
    at the next step boundary, with its state saved.

    A second Ctrl-C does not wait for the boundary. Where Ctrl-C is ignored, or somebody else's, it
    stays so.
    """

    def __init__(self) -> None:
        self.before: dict[signal.Signals, Any] = {}

    def on_start(self, training: TrainingState) -> None:
        """Take over the signals that ask for a stop."""

        def request(number: int, frame: FrameType | None) -> None:
            training.stop_requested = True
            interrupts.let_go_of_terminal(number)
            if number == signal.SIGINT:
                training.interrupted = True
                signal.signal(number, signal.default_int_handler)
                os.write(2, b"\nstopping at the end of this step; Ctrl-C again ends at once\n")

        # Python delivers signals nowhere else
        if threading.current_thread() is threading.main_thread():
            ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
            numbers = (*interrupts.list_stop_signals(), *((signal.SIGINT,) if ours else ()))
            self.before = {number: signal.signal(number, request) for number in numbers}

    def close(self) -> None:
        """Give the signals back."""
        for number, handler in self.before.items():
            signal.signal(number, handler)

        self.before = {}
