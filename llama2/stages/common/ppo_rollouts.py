"""PPO's data (§3.2.3): the policy answers prompts, reward models score, KL and GAE make advantages.

    R(g | p) = R~_c(g | p) - beta * KL(pi_theta || pi_0),   R~_c = whiten(logit(R_c))          (equation 4)

`Rollouts` is a source like any other: `fit` asks it for the micro-batches of one update, and it
samples afresh when the last batch is used up. What the paper leaves open is chosen as follows. The
KL penalty is spread over the tokens (-beta (log pi - log pi_0) each) and the score stands at the
last; whitening is over the batch of one iteration; values come from a separate critic that starts
as the reward model (Stiennon et al. 2020); gamma is 1, lambda 0.95.

A reward model's raw scores are nowhere near whitened returns, and that error would be most of the
first updates. So the critic is put on their scale once, on the answers of the first iteration,
before anything is learnt from them: a gain and a shift of its linear head, by least squares.
Ziegler et al. (2019) fix gain and bias of their reward model so; that a linear head takes them up
exactly is van Hasselt et al. (2016).

Shapes: B rows, T positions; a position's action is its target.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llama2 import devices
from llama2.batches import Batch
from llama2.generate.dialogue import Answer, Chat
from llama2.generate.rewards import Rewards, Score, probability
from llama2.model.llama import Llama
from llama2.model.scorer import Scorer
from llama2.ranks import Ranks
from llama2.records import Prompt
from llama2.stages.common.sampling import Sample, answer, score

# the parts of ActorCritic, by the prefix of their parameters' names
ACTOR, CRITIC = "actor.", "critic."


class ActorCritic(nn.Module):
    """The policy and its value model as one module: one optimizer step trains both towers."""

    shift: Tensor

    def __init__(self, actor: Llama, critic: Scorer) -> None:
        super().__init__()
        self.actor, self.critic = actor, critic
        self.register_buffer("shift", torch.zeros(1))  # a scorer's head has no bias

    def forward(self, tokens_BT: Tensor, *, targets_BT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities of the targets, entropies and values, each [B, T] in fp32."""
        logp_BT, entropy_BT = self.actor(tokens_BT, targets_BT=targets_BT, entropy=True)
        return logp_BT, entropy_BT, self.critic(tokens_BT) + self.shift

    @torch.no_grad()
    def rescale(self, gain: float, shift: float) -> None:
        """Make every value `gain` times what it was, plus `shift`. All ranks call it alike."""
        self.critic.score.weight.mul_(gain)
        self.shift.mul_(gain).add_(shift)


@dataclass(frozen=True)
class Settings:
    """What shapes a rollout; the names and defaults are those of `ppo.Config`."""

    batch_size: int
    minibatch_size: int
    micro_batch_size: int
    epochs: int
    beta: float
    gamma: float
    lambda_: float
    unfinished: float | None
    sample: Sample
    precision: devices.Precision
    seed: int


class Rollouts:
    """Yields the micro-batches of one update; `batch_size / minibatch_size * epochs` updates an
    iteration."""

    def __init__(
        self,
        models: ActorCritic,
        reference: Llama,
        rewards: Rewards,
        chat: Chat,
        prompts: Sequence[Prompt],
        settings: Settings,
        max_iterations: int,
        observe: Callable[[dict[str, float]], None],
    ) -> None:
        self.models, self.reference, self.rewards, self.chat = models, reference, rewards, chat
        self.prompts, self.settings, self.max_iterations, self.observe = (
            prompts,
            settings,
            max_iterations,
            observe,
        )
        self.iteration = 0
        self.scaled = False
        self.buffer: list[list[Batch]] = []
        self.samples: list[dict[str, Any]] = []

    @property
    def updates(self) -> int:
        """Optimizer steps an iteration."""
        return -(-self.settings.batch_size // self.settings.minibatch_size) * self.settings.epochs

    def __next__(self) -> list[Batch]:
        if not self.buffer:
            if self.iteration == self.max_iterations:
                raise StopIteration

            self.buffer = self._iterate()
            self.iteration += 1

        return self.buffer.pop(0)

    def state_dict(self) -> dict[str, Any]:
        """The iteration and what is left of its batches: PPO resumes inside an iteration."""
        return {
            "iteration": self.iteration,
            "scaled": self.scaled,
            "buffer": self.buffer,
            "samples": self.samples,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.iteration, self.scaled = state["iteration"], state["scaled"]
        self.buffer, self.samples = state["buffer"], state["samples"]

    # --- one iteration ---

    def _iterate(self) -> list[list[Batch]]:
        """Sample, score, and cut into minibatches."""
        settings, begin = self.settings, time.perf_counter()
        prompts = self._choose()
        self.models.eval()
        answers = [
            one[0]
            for one in answer(
                self.chat,
                [prompt.messages for prompt in prompts],
                settings.sample,
                seed=seeded(settings.seed, self.iteration),
            )
        ]
        rolled = time.perf_counter()
        scores = [
            one[0]
            for one in score(self.rewards, self.chat.tokenizer, prompts, [[one] for one in answers])
        ]
        finals = torch.tensor([self._final(one, mark) for one, mark in zip(answers, scores)])
        joined = whiten(finals)
        order = shuffled(len(prompts), seeded(settings.seed, 7919 * self.iteration))
        cuts = torch.split(order, settings.minibatch_size)
        minibatches = [self._read([answers[i] for i in cut], joined[cut]) for cut in cuts]
        batches = [batch for minibatch in minibatches for batch in minibatch]

        if not self.scaled and joined.any():  # answers of equal reward set no scale
            self._scale(batches)

        statistics_ = self._judge(batches)
        self.observe(
            {
                **describe(answers, scores),
                "reward/deviation": float(finals.std(correction=0)),
                **statistics_,
                "time/rollout": rolled - begin,
                "time/scoring": time.perf_counter() - rolled,
            }
        )
        self.samples = [
            {
                "prompt": prompt.messages[-1].content,
                "answer": one.text,
                "reward": probability(mark.joined),
            }
            for prompt, one, mark in list(zip(prompts, answers, scores))[:8]
        ]

        return [
            [strip(batch) for batch in minibatch]
            for _ in range(settings.epochs)
            for minibatch in minibatches
        ]

    def _choose(self) -> list[Prompt]:
        """The prompts of this iteration: passes over all of them, each in an order of its own."""
        chosen: list[Prompt] = []
        place = self.iteration * self.settings.batch_size
        while len(chosen) < self.settings.batch_size:
            epoch, offset = divmod(place + len(chosen), len(self.prompts))
            order = shuffled(len(self.prompts), seeded(self.settings.seed * 10007, epoch)).tolist()
            chosen += [
                self.prompts[i]
                for i in order[offset : offset + self.settings.batch_size - len(chosen)]
            ]

        return chosen

    def _final(self, one: Answer, mark: Score) -> float:
        """logit(R_c), or what an answer that never ended is given instead."""
        cut_off = one.completion.finish != "stop"
        return (
            self.settings.unfinished
            if cut_off and self.settings.unfinished is not None
            else mark.joined
        )

    @torch.no_grad()
    def _read(self, answers: Sequence[Answer], rewards: Tensor) -> list[Batch]:
        """This rank's micro-batches of one minibatch, with everything the models say about them
        before the update.

        Old log-probabilities come from the very forward pass of the update (same rows, same
        padding, same precision), so that where computation is deterministic the first ratio of an
        iteration is exactly 1 and the first KL exactly 0.
        """
        order = sorted(
            range(len(answers)),
            key=lambda i: len(answers[i].completion.prompt) + len(answers[i].completion.tokens),
        )
        ranks = self.chat.ranks
        mine = ranks.share(order)
        size = self.settings.micro_batch_size
        batches = []

        for start in range(0, len(mine), size):
            some = mine[start : start + size]
            batch = collate([answers[i] for i in some], rewards[some])
            moved = {name: tensor.to(ranks.device) for name, tensor in batch.items()}

            with devices.autocast(ranks.device, self.settings.precision):
                logp_BT, _, values_BT = self.models(
                    moved["tokens_BT"], targets_BT=moved["targets_BT"]
                )
                reference_BT = self.reference(moved["tokens_BT"], targets_BT=moved["targets_BT"])

            mask_BT = batch["weights_BT"]
            batch |= {
                "old_logp_BT": logp_BT.cpu(),
                "old_values_BT": values_BT.cpu() * mask_BT,
                "kl_BT": (logp_BT - reference_BT).cpu() * mask_BT,
            }
            batch["rewards_BT"] = batch["final_BT"] - self.settings.beta * batch["kl_BT"]
            batches.append(batch)

        return batches

    @torch.no_grad()
    def _scale(self, batches: Sequence[Batch]) -> None:
        """Give the critic the gain and the shift with which it best predicts what was still to
        come, in least squares.

        What is still to come (the advantages of a critic that says 0, with lambda 1) does not
        depend on the critic.
        """
        pairs = [
            (
                batch["old_values_BT"].double(),
                advantages(
                    batch["rewards_BT"],
                    torch.zeros_like(batch["rewards_BT"]),
                    batch["weights_BT"],
                    self.settings.gamma,
                    1.0,
                ).double(),
                batch["weights_BT"],
            )
            for batch in batches
        ]
        count, *sums = totals(
            self.chat.ranks,
            5,
            [(mask, value, coming, value * value, value * coming) for value, coming, mask in pairs],
        )
        value, coming, square, product = (total / count for total in sums)
        variance = square - value * value
        gain = (product - value * coming) / variance if variance > 1e-12 else 1.0
        shift = coming - gain * value

        self.models.rescale(gain, shift)

        for batch in batches:
            batch["old_values_BT"] = (gain * batch["old_values_BT"] + shift) * batch["weights_BT"]

        self.scaled = True

    def _judge(self, batches: Sequence[Batch]) -> dict[str, float]:
        """Advantages, whitened over the iteration and all ranks, and returns; statistics of what
        was sampled."""
        for batch in batches:
            batch["advantages_BT"] = advantages(
                batch["rewards_BT"],
                batch["old_values_BT"],
                batch["weights_BT"],
                self.settings.gamma,
                self.settings.lambda_,
            )
            batch["returns_BT"] = batch["advantages_BT"] + batch["old_values_BT"]

        count, total, squares, kl, distance, gap, rows = totals(
            self.chat.ranks,
            7,
            [
                (
                    batch["weights_BT"],
                    batch["advantages_BT"],
                    batch["advantages_BT"].double() ** 2,
                    batch["kl_BT"],
                    batch["kl_BT"].abs(),
                    (batch["old_logp_BT"] - batch["engine_BT"]).abs() * batch["weights_BT"],
                    torch.ones(len(batch["weights_BT"])),
                )
                for batch in batches
            ],
        )
        mean = total / count
        deviation = max(squares / count - mean * mean, 1e-12) ** 0.5

        for batch in batches:
            batch["advantages_BT"] = (
                (batch["advantages_BT"] - mean) / deviation * batch["weights_BT"]
            )

        first = {"ppo/first_kl": distance / count} if self.iteration == 0 else {}
        return {"ppo/kl_reference": kl / rows, "ppo/engine_gap": gap / count, **first}


def totals(ranks: Ranks, columns: int, rows: Sequence[Sequence[Tensor]]) -> list[float]:
    """Each column's sum over all rows, here and on the other ranks, in fp64."""
    sums = torch.zeros(columns, dtype=torch.float64)
    for row in rows:
        sums += torch.stack([value.double().sum() for value in row])

    found: list[float] = ranks.all_sum(sums.to(ranks.device)).tolist()
    return found


def seeded(seed: int, place: int) -> int:
    """The seed of one place in a run, in the range of every generator."""
    return (seed + place) % 2**63


def shuffled(count: int, seed: int) -> Tensor:
    """The numbers below `count` in an order drawn from `seed`."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def collate(answers: Sequence[Answer], rewards: Tensor) -> Batch:
    """Prompts and answers as right-padded rows: inputs, targets, the mask of answers, the score at
    their last token; read_B, the inputs of each row that are no padding."""
    lengths = [(len(one.completion.prompt), len(one.completion.tokens)) for one in answers]
    width = max(prompt + new for prompt, new in lengths) - 1
    tokens_BT, targets_BT = (torch.zeros(len(answers), width, dtype=torch.long) for _ in range(2))
    weights_BT, final_BT, engine_BT = (torch.zeros(len(answers), width) for _ in range(3))

    for row, (one, (prompt, new)) in enumerate(zip(answers, lengths)):
        ids = torch.tensor([*one.completion.prompt, *one.completion.tokens])
        tokens_BT[row, : len(ids) - 1], targets_BT[row, : len(ids) - 1] = ids[:-1], ids[1:]
        weights_BT[row, prompt - 1 : prompt + new - 1] = 1.0
        engine_BT[row, prompt - 1 : prompt + new - 1] = torch.tensor(one.completion.logprobs)
        final_BT[row, prompt + new - 2] = rewards[row]

    return {
        "tokens_BT": tokens_BT,
        "targets_BT": targets_BT,
        "weights_BT": weights_BT,
        "final_BT": final_BT,
        "engine_BT": engine_BT,
        "read_B": torch.tensor([prompt + new - 1 for prompt, new in lengths]),
    }


def strip(batch: Batch) -> Batch:
    """What the objective needs of a micro-batch."""
    keep = (
        "tokens_BT",
        "targets_BT",
        "weights_BT",
        "old_logp_BT",
        "old_values_BT",
        "advantages_BT",
        "returns_BT",
        "read_B",
    )
    return {name: batch[name] for name in keep}


def whiten(values: Tensor) -> Tensor:
    """Mean 0, deviation 1 over the batch (the whitening of equation 4); 0 where all are equal but
    for rounding."""
    exact = values.double()  # in fp32 the mean of equal numbers may differ from them
    deviation = exact.std(correction=0)
    if deviation < 1e-6:
        return torch.zeros_like(values)

    return ((exact - exact.mean()) / deviation).to(values.dtype)


def advantages(
    rewards_BT: Tensor, values_BT: Tensor, mask_BT: Tensor, gamma: float, lambda_: float
) -> Tensor:
    """Generalised advantage estimates, 0 outside of the mask (Schulman et al. 2016, equation 16).

    delta_t = r_t + gamma V_{t+1} - V_t;  A_t = delta_t + gamma lambda A_{t+1}; beyond the last
    token both are 0.
    """
    result_BT = torch.zeros_like(rewards_BT)
    following_B = torch.zeros(len(rewards_BT))
    next_value_B = torch.zeros(len(rewards_BT))

    for t in range(rewards_BT.shape[1] - 1, -1, -1):
        mask_B = mask_BT[:, t]
        delta_B = rewards_BT[:, t] + gamma * next_value_B - values_BT[:, t]
        following_B = mask_B * (delta_B + gamma * lambda_ * following_B)
        next_value_B = mask_B * values_BT[:, t]
        result_BT[:, t] = following_B

    return result_BT


def describe(answers: Sequence[Answer], scores: Sequence[Score]) -> dict[str, float]:
    """How the sampled answers look and score."""
    lengths = [float(len(one.completion.tokens)) for one in answers]
    joined = [probability(one.joined) for one in scores]
    found = {
        "ppo/length": statistics.fmean(lengths),
        "ppo/eos_rate": statistics.fmean(one.completion.finish == "stop" for one in answers),
        "reward/mean": statistics.fmean(joined),
        "reward/raw": statistics.fmean(one.joined for one in scores),
        "reward/helpfulness": statistics.fmean(probability(one.helpful) for one in scores),
    }

    if all(one.safe != float("inf") for one in scores):
        found["reward/safety"] = statistics.fmean(probability(one.safe) for one in scores)

    if len(set(lengths)) > 1 and len(set(joined)) > 1:
        found["reward/length_correlation"] = statistics.correlation(lengths, joined)

    return found
