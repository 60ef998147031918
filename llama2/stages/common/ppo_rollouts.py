"""PPO's data (§3.2.3): the policy's answers, the reward models' scores, KL, and advantages by GAE.

    R(g | p) = R~_c(g | p) - beta * KL(pi_theta || pi_0),   R~_c = whiten(logit(R_c))    (eq. 4)

`Rollouts` is a source like any other: `fit` asks it for the micro-batches of one update, and it
samples anew when the last batch is used up. Where the paper leaves a choice, it is as follows. The
KL penalty is spread over the tokens (-beta (log pi - log pi_0) each) and the score stands at the
last; whitening is over the batch of one iteration; values come from a separate critic that starts
as the reward model (Stiennon et al. 2020); gamma is 1, lambda 0.95.

A reward model's raw scores are far from whitened returns, and that error would be most of the first
updates. So the critic is put on their scale once, on the answers of the first iteration, before
anything is learnt from them: a gain and a shift of its linear head, by least squares. Ziegler et
al. (2019) fix gain and bias of their reward model in this way; van Hasselt et al. (2016) show that
a linear head takes them up exactly.

Shapes: B rows, T positions; a position's action is its target.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn

from llama2 import devices
from llama2.batches import Batch
from llama2.generate.dialogue import Answer, Chat
from llama2.generate.rewards import Rewards, Score, to_probability
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
        # a scorer's head has no bias
        self.register_buffer("shift", torch.zeros(1, device=actor.device))

    def forward(self, tokens_BT: Tensor, *, targets_BT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return log-probabilities of the targets, entropies and values, each [B, T] in fp32."""
        logp_BT, entropy_BT = self.actor(tokens_BT, targets_BT=targets_BT, entropy=True)
        return logp_BT, entropy_BT, self.critic(tokens_BT) + self.shift

    @torch.no_grad()
    def rescale(self, gain: float, shift: float) -> None:
        """Make every value `gain` times what it was, plus `shift`. All ranks call it alike."""
        self.critic.score.weight.mul_(gain)
        self.shift.mul_(gain).add_(shift)


@dataclass(frozen=True)
class Settings:
    """The settings of a rollout; names and defaults are those of `ppo.Config`."""

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
        self.prompts, self.settings = prompts, settings
        self.max_iterations, self.observe = max_iterations, observe
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
        """Return the iteration and the rest of its batches: PPO resumes inside an iteration."""
        return {
            "iteration": self.iteration,
            "scaled": self.scaled,
            "buffer": self.buffer,
            "samples": self.samples,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.iteration, self.scaled = state["iteration"], state["scaled"]
        self.buffer, self.samples = state["buffer"], state["samples"]

    # --- one iteration ---

    def _iterate(self) -> list[list[Batch]]:
        """Sample, score, and cut into minibatches; returns those of all updates."""
        settings, begin = self.settings, time.perf_counter()
        prompts = self._choose()
        self.models.eval()
        self.chat.engine.update(self.models.actor)
        messages = [prompt.messages for prompt in prompts]
        seed = offset_seed(settings.seed, self.iteration)
        groups = answer(self.chat, messages, settings.sample, seed=seed)
        answers = [group[0] for group in groups]

        sampled = time.perf_counter()
        scores = [group[0] for group in score(self.rewards, self.chat.tokenizer, prompts, groups)]
        rewards = torch.tensor([self._reward(*pair) for pair in zip(answers, scores)])
        whitened = whiten(rewards)
        minibatches = self._cut(answers, whitened)
        batches = list(chain(*minibatches))
        if not self.scaled and whitened.any():  # answers of equal reward set no scale
            self._scale(batches)

        self._add_advantages(batches)
        self.observe(
            {
                **describe(answers, scores),
                "reward/deviation": float(rewards.std(correction=0)),
                **self._measure(batches),
                "time/rollout": sampled - begin,
                "time/scoring": time.perf_counter() - sampled,
            }
        )
        self.samples = [
            {
                "prompt": prompt.messages[-1].content,
                "answer": answer.text,
                "reward": to_probability(score.reward),
            }
            for prompt, answer, score in islice(zip(prompts, answers, scores), 8)
        ]
        stripped = [list(map(keep_training_tensors, batches)) for batches in minibatches]
        return stripped * settings.epochs

    def _choose(self) -> list[Prompt]:
        """Return the prompts of this iteration: passes over all of them, each in an order of its
        own."""
        chosen: list[Prompt] = []
        size, begin = self.settings.batch_size, self.iteration * self.settings.batch_size
        while len(chosen) < size:
            epoch, offset = divmod(begin + len(chosen), len(self.prompts))
            seed = offset_seed(self.settings.seed * 10007, epoch)
            order = shuffle_indices(len(self.prompts), seed).tolist()
            chosen += [self.prompts[i] for i in order[offset : offset + size - len(chosen)]]

        return chosen

    def _cut(self, answers: Sequence[Answer], rewards: Tensor) -> list[list[Batch]]:
        """Return this rank's micro-batches of each minibatch, the answers in random order."""
        seed = offset_seed(self.settings.seed, 7919 * self.iteration)
        minibatches = []
        for part in torch.split(shuffle_indices(len(answers), seed), self.settings.minibatch_size):
            minibatches.append(self._read([answers[i] for i in part], rewards[part]))

        return minibatches

    def _reward(self, answer: Answer, score: Score) -> float:
        """Return logit(R_c), or the reward set for an answer that never ended."""
        if self.settings.unfinished is not None and answer.completion.finish != "stop":
            return self.settings.unfinished

        return score.reward

    @torch.no_grad()
    def _read(self, answers: Sequence[Answer], rewards: Tensor) -> list[Batch]:
        """Return this rank's micro-batches of one minibatch, with everything the models say about
        them before the update.

        Old log-probabilities come from the very forward pass of the update (same rows, same
        padding, same precision), so that where computation is deterministic the first ratio of an
        iteration is exactly 1 and the first KL exactly 0.
        """
        lengths = [
            len(answer.completion.prompt) + len(answer.completion.tokens) for answer in answers
        ]
        order = sorted(range(len(answers)), key=lambda i: lengths[i])
        ranks = self.chat.ranks
        share = ranks.share(order)
        size = self.settings.micro_batch_size
        batches = []

        for start in range(0, len(share), size):
            part = share[start : start + size]
            batch = collate([answers[i] for i in part], rewards[part])
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
        """Give the critic the gain and the shift with which it best predicts the returns, in least
        squares.

        These returns (the advantages of a critic that says 0, with lambda 1) do not depend on the
        critic.
        """
        rows = []
        for batch in batches:
            none_BT = torch.zeros_like(batch["rewards_BT"])
            return_BT = self._estimate(batch, none_BT, lambda_=1.0).double()
            value_BT = batch["old_values_BT"].double()
            products = (value_BT * value_BT, value_BT * return_BT)
            rows.append((batch["weights_BT"], value_BT, return_BT, *products))

        count, *sums = sum_columns(self.chat.ranks, 5, rows)
        value, coming, square, product = (total / count for total in sums)
        variance = square - value * value
        gain = (product - value * coming) / variance if variance > 1e-12 else 1.0
        shift = coming - gain * value

        self.models.rescale(gain, shift)

        for batch in batches:
            batch["old_values_BT"] = (gain * batch["old_values_BT"] + shift) * batch["weights_BT"]

        self.scaled = True

    def _estimate(self, batch: Batch, values_BT: Tensor, lambda_: float) -> Tensor:
        """Return the advantages of one micro-batch for a critic that says `values_BT`."""
        return estimate_advantages(
            batch["rewards_BT"], values_BT, batch["weights_BT"], self.settings.gamma, lambda_
        )

    def _add_advantages(self, batches: Sequence[Batch]) -> None:
        """Add returns, and advantages whitened over the iteration and all ranks."""
        rows = []
        for batch in batches:
            advantages_BT = self._estimate(batch, batch["old_values_BT"], self.settings.lambda_)
            batch["advantages_BT"] = advantages_BT
            batch["returns_BT"] = advantages_BT + batch["old_values_BT"]
            rows.append((batch["weights_BT"], advantages_BT, advantages_BT.double() ** 2))

        count, total, squares = sum_columns(self.chat.ranks, 3, rows)
        mean = total / count
        deviation = max(squares / count - mean * mean, 1e-12) ** 0.5

        for batch in batches:
            whitened_BT = (batch["advantages_BT"] - mean) / deviation
            batch["advantages_BT"] = whitened_BT * batch["weights_BT"]

    def _measure(self, batches: Sequence[Batch]) -> dict[str, float]:
        """Return the distances of the policy from its reference and from the engine, in nats."""
        rows = []
        for batch in batches:
            mask_BT, kl_BT = batch["weights_BT"], batch["kl_BT"]
            gap_BT = (batch["old_logp_BT"] - batch["engine_BT"]).abs() * mask_BT
            rows.append((mask_BT, kl_BT, kl_BT.abs(), gap_BT, torch.ones(len(mask_BT))))

        tokens, kl, distance, gap, answers = sum_columns(self.chat.ranks, 5, rows)
        first = {"ppo/first_kl": distance / tokens} if self.iteration == 0 else {}
        return {"ppo/kl_reference": kl / answers, "ppo/engine_gap": gap / tokens, **first}


def sum_columns(ranks: Ranks, columns: int, rows: Sequence[Sequence[Tensor]]) -> list[float]:
    """Return each column's sum over all rows, here and on the other ranks, in fp64."""
    sums = torch.zeros(columns, dtype=torch.float64)
    for row in rows:
        sums += torch.stack([value.double().sum() for value in row])

    result: list[float] = ranks.all_sum(sums.to(ranks.device)).tolist()
    return result


def offset_seed(seed: int, offset: int) -> int:
    """Return the seed of one use in a run, in the range of every generator."""
    return (seed + offset) % 2**63


def shuffle_indices(count: int, seed: int) -> Tensor:
    """Return the numbers below `count` in an order drawn from `seed`."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def collate(answers: Sequence[Answer], rewards: Tensor) -> Batch:
    """Return prompts and answers as right-padded rows: inputs, targets, the mask of answers, the
    reward at their last token; read_B, the inputs of each row that are not padding."""
    completions = [answer.completion for answer in answers]
    lengths = [len(completion.prompt) + len(completion.tokens) for completion in completions]
    shape = (len(answers), max(lengths) - 1)
    tokens_BT, targets_BT = (torch.zeros(shape, dtype=torch.long) for _ in range(2))
    weights_BT, final_BT, engine_BT = (torch.zeros(shape) for _ in range(3))

    for row, completion in enumerate(completions):
        ids = torch.tensor([*completion.prompt, *completion.tokens])
        last = len(ids) - 1
        answer = slice(len(completion.prompt) - 1, last)
        tokens_BT[row, :last] = ids[:-1]
        targets_BT[row, :last] = ids[1:]
        weights_BT[row, answer] = 1.0
        engine_BT[row, answer] = torch.tensor(completion.logprobs)
        final_BT[row, last - 1] = rewards[row]

    return {
        "tokens_BT": tokens_BT,
        "targets_BT": targets_BT,
        "weights_BT": weights_BT,
        "final_BT": final_BT,
        "engine_BT": engine_BT,
        "read_B": torch.tensor(lengths) - 1,
    }


def keep_training_tensors(batch: Batch) -> Batch:
    """Return the tensors of a micro-batch that the objective needs."""
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
    """Return values of mean 0 and deviation 1 over the batch (the whitening of equation 4); 0 where
    all are equal but for rounding."""
    exact = values.double()  # in fp32 the mean of equal numbers may differ from them
    deviation = exact.std(correction=0)
    if deviation < 1e-6:
        return torch.zeros_like(values)

    return ((exact - exact.mean()) / deviation).to(values.dtype)


def estimate_advantages(
    rewards_BT: Tensor, values_BT: Tensor, mask_BT: Tensor, gamma: float, lambda_: float
) -> Tensor:
    """Return generalised advantage estimates, 0 outside of the mask (Schulman et al. 2016, eq. 16).

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
    """Return the lengths, endings and scores of the sampled answers."""
    lengths = [float(len(answer.completion.tokens)) for answer in answers]
    rewards = [to_probability(score.reward) for score in scores]
    finished = [answer.completion.finish == "stop" for answer in answers]
    raw = [score.reward for score in scores]
    helpful = [to_probability(score.helpful) for score in scores]
    result = {
        "ppo/length": statistics.fmean(lengths),
        "ppo/eos_rate": statistics.fmean(finished),
        "reward/mean": statistics.fmean(rewards),
        "reward/raw": statistics.fmean(raw),
        "reward/helpfulness": statistics.fmean(helpful),
    }
    if all(score.safe != float("inf") for score in scores):
        result["reward/safety"] = statistics.fmean(to_probability(score.safe) for score in scores)

    if len(set(lengths)) > 1 and len(set(rewards)) > 1:
        result["reward/length_correlation"] = statistics.correlation(lengths, rewards)

    return result
