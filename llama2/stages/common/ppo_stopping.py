"""Early stopping of PPO on held-out prompts, and the policy that was best on them."""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from llama2 import devices
from llama2.errors import UserError
from llama2.evaluate.judges import classify
from llama2.formats.hf_directory import list_model_files, verify_checksums
from llama2.generate.dialogue import Answer, Chat
from llama2.generate.rewards import Rewards, to_probability
from llama2.ranks import Ranks
from llama2.records import Prompt
from llama2.stages.common.ppo_rollouts import ActorCritic
from llama2.stages.common.sampling import Sample, answer, score
from llama2.tokenizer.tokenizer import Tokenizer
from llama2.train import hooks
from llama2.train.loop import TrainingState


class EarlyStopping(hooks.Validate):
    """Validation that also looks at the starting policy: it is the one to beat."""

    def on_start(self, training: TrainingState) -> None:
        """Measure the starting policy."""
        if training.learner.step == 0:
            self._validate(training)


@dataclass(frozen=True)
class HeldoutReward:
    """Reward of the policy's answers to held-out prompts."""

    chat: Chat
    rewards: Rewards
    """what is optimised"""
    judge: Rewards | None
    """what judges instead"""
    prompts: Sequence[Prompt]
    sample: Sample
    seed: int

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """Answer the prompts with the policy as it is, and measure the answers."""
        assert isinstance(model, ActorCritic)
        self.chat.engine.update(model.actor)
        questions = [prompt.messages for prompt in self.prompts]
        answers = answer(self.chat, questions, self.sample, seed=self.seed)
        if self.judge is None:
            return measure_reward(self.chat, self.rewards, self.prompts, answers)

        with swap_in(self.judge, self.rewards, self.chat.ranks.device):
            return measure_reward(self.chat, self.judge, self.prompts, answers)


@contextmanager
def swap_in(judge: Rewards, rewards: Rewards, device: torch.device) -> Iterator[None]:
    """Have the judge on the device, in the place of the reward models: it is needed so seldom that
    it has none of its own."""
    rewards.to(devices.CPU)
    judge.to(device)
    try:
        yield
    finally:
        judge.to(devices.CPU)
        rewards.to(device)


def measure_reward(
    chat: Chat, judge: Rewards, prompts: Sequence[Prompt], answers: Sequence[Sequence[Answer]]
) -> dict[str, float]:
    """Measure the mean probability of being good, by kind of prompt and over kinds: every kind
    counts alike, whatever its number."""
    kinds: dict[str, list[float]] = {}
    scores = score(judge, chat.tokenizer, prompts, answers)
    for prompt, (first, *_) in zip(prompts, scores):
        kinds.setdefault(classify(prompt), []).append(to_probability(first.reward))

    means = {f"heldout/{kind}": statistics.fmean(values) for kind, values in kinds.items()}
    return {**means, "heldout/reward": statistics.fmean(means.values())}


@dataclass(frozen=True)
class BestPolicy:
    """The policy that was best on held-out prompts so far, if one was measured."""

    path: Path
    """where it is kept while the run goes on"""
    save: Callable[[Path], None]
    """writes the policy as it is now"""
    tokenizer: Tokenizer
    ranks: Ranks

    def keep(self) -> None:
        """Take the policy as it is now for the best."""
        self.save(self.path)

    def adopt(self, directory: Path) -> None:
        """Write the best policy, or the last where none was measured; UserError if the best was
        damaged meanwhile."""
        if not self.path.exists():
            self.save(directory)
            return

        try:
            self.ranks.first(lambda: verify_checksums(self.path))
        except UserError as error:
            cure = f"delete {self.path.parent}: the same command starts over"
            raise UserError(error.cause, cure) from None

        if self.ranks.is_main:
            for name in list_model_files(self.path):
                shutil.copy2(self.path / name, directory / name)

            self.tokenizer.save(directory)
