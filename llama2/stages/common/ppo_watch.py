"""Metrics of each PPO iteration, and the stop where the policy runs away."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llama2.train.loop import Hook, Report, TrainingState


class Watch(Hook):
    """Publishes what each iteration's rollout and updates looked like; stops when KL runs away."""

    def __init__(self, kl_stop: float, updates: int) -> None:
        """`updates` make an iteration; `kl_stop` is the most nats of an answer from the start."""
        self.kl_stop, self.updates = kl_stop, updates
        self.pending: dict[str, float] = {}
        self.update_seconds = 0.0

    def observe(self, metrics: Mapping[str, float]) -> None:
        """Take the metrics of a rollout, of which the updates follow."""
        self.pending = dict(metrics)

    def on_step(self, training: TrainingState, report: Report) -> None:
        """Add an update to its iteration, and publish that after its last one."""
        seconds = report.seconds
        if (report.step - 1) % self.updates == 0:
            deviation = report.sums["ppo/ratio_deviation"] / (report.weight or 1.0)
            self.pending["ppo/first_ratio_deviation"] = deviation
            for phase in ("time/rollout", "time/scoring"):
                seconds -= self.pending.get(phase, 0.0)

        self.update_seconds += seconds
        for tower, norm in report.gradient_norms.items():
            name = tower.rstrip(".")
            clipped = measure_clipping(norm, training.plan.clip)
            self._add_to_mean(f"ppo/{name}_grad_norm", norm)
            self._add_to_mean(f"ppo/{name}_clipped", clipped)

        if report.step % self.updates == 0:
            training.log({**self.pending, "time/update": self.update_seconds})
            self.update_seconds = 0.0
            if self.pending.get("ppo/kl_reference", 0.0) > self.kl_stop:
                training.finish = True

    def _add_to_mean(self, name: str, value: float) -> None:
        """Add one update's value to the mean over the iteration's."""
        self.pending[name] = self.pending.get(name, 0.0) + value / self.updates

    def state_dict(self) -> dict[str, Any]:
        """Return what a run that resumes within an iteration must know."""
        return {"pending": self.pending, "update_seconds": self.update_seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        self.pending, self.update_seconds = state["pending"], state["update_seconds"]


def measure_clipping(norm: float, limit: float) -> float:
    """Return the share of a gradient of this norm that clipping takes away."""
    return 1 - limit / norm if norm > limit else 0.0
