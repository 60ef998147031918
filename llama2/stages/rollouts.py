"""PPO's data (§3.2.3): the policy answers prompts, reward models score, KL and GAE make advantages.

    R(g | p) = R~_c(g | p) - beta * KL(pi_theta || pi_0),   R~_c = whiten(logit(R_c))          (equation 4)

`Rollouts` is a source like any other: `fit` asks it for the micro-batches of one update, and it samples afresh when
the last batch is used up. What the paper leaves open is chosen as follows. The KL penalty is spread over the tokens
(-beta (log pi - log pi_0) each) and the score stands at the last; whitening is over the batch of one iteration;
values come from a separate critic that starts as the reward model; gamma is 1, lambda 0.95.

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

from llama2 import mesh
from llama2.generate.dialogue import Answer, Chat
from llama2.generate.rewards import Rewards, Score, probability
from llama2.model.llama import Llama
from llama2.model.scorer import Scorer
from llama2.records import Prompt
from llama2.stages.sampling import Sample, answer, score
from llama2.train.loop import Batch


class ActorCritic(nn.Module):
    """The policy and its value model as one module: one optimizer step trains both towers."""

    def __init__(self, actor: Llama, critic: Scorer) -> None:
        super().__init__()
        self.actor, self.critic = actor, critic

    def forward(self, tokens_BT: Tensor, *, targets_BT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities of the targets, entropies and values, each [B, T] in fp32."""
        logp_BT, entropy_BT = self.actor(tokens_BT, targets_BT=targets_BT, entropy=True)
        return logp_BT, entropy_BT, self.critic(tokens_BT)


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
    precision: mesh.Precision
    seed: int


class Rollouts:
    """Yields the micro-batches of one update; `batch_size / minibatch_size * epochs` updates an iteration."""

    def __init__(self, models: ActorCritic, reference: Llama, rewards: Rewards, chat: Chat, prompts: Sequence[Prompt],
                 settings: Settings, max_iterations: int, observe: Callable[[dict[str, float]], None]) -> None:
        self.models, self.reference, self.rewards, self.chat = models, reference, rewards, chat
        self.prompts, self.settings, self.max_iterations, self.observe = prompts, settings, max_iterations, observe
        self.iteration = 0
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
        return {"iteration": self.iteration, "buffer": self.buffer, "samples": self.samples}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.iteration, self.buffer, self.samples = state["iteration"], state["buffer"], state["samples"]

    # --- one iteration ---

    def _iterate(self) -> list[list[Batch]]:
        """Sample, score, and cut into minibatches."""
        settings, begin = self.settings, time.perf_counter()
        prompts = self._choose()
        self.models.eval()
        answers = [one[0] for one in answer(self.chat, [prompt.messages for prompt in prompts], settings.sample,
                                            seed=settings.seed + self.iteration)]
        rolled = time.perf_counter()
        scores = [one[0] for one in score(self.rewards, self.chat.tokenizer, prompts, [[one] for one in answers])]
        joined = whiten(torch.tensor([self._final(one, mark) for one, mark in zip(answers, scores)]))
        order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(settings.seed
                                                                                   + 7919 * self.iteration))
        cuts = torch.split(order, settings.minibatch_size)
        minibatches = [self._minibatch([answers[i] for i in cut], joined[cut]) for cut in cuts]
        statistics_ = self._finish(minibatches)
        self.observe({**describe(answers, scores), **statistics_, "time/rollout": rolled - begin,
                      "time/scoring": time.perf_counter() - rolled})
        self.samples = [{"prompt": prompt.messages[-1].content, "answer": one.text, "reward": probability(mark.joined)}
                        for prompt, one, mark in list(zip(prompts, answers, scores))[:8]]
        return [[strip(batch) for batch in minibatch] for _ in range(settings.epochs) for minibatch in minibatches]

    def _choose(self) -> list[Prompt]:
        """The prompts of this iteration: passes over all of them, each in an order of its own."""
        chosen: list[Prompt] = []
        place = self.iteration * self.settings.batch_size
        while len(chosen) < self.settings.batch_size:
            epoch, offset = divmod(place + len(chosen), len(self.prompts))
            generator = torch.Generator().manual_seed(self.settings.seed * 10007 + epoch)
            order = torch.randperm(len(self.prompts), generator=generator).tolist()
            chosen += [self.prompts[i] for i in order[offset:offset + self.settings.batch_size - len(chosen)]]
        return chosen

    def _final(self, one: Answer, mark: Score) -> float:
        """logit(R_c), or what an answer that never ended is given instead."""
        cut_off = one.completion.finish != "stop"
        return self.settings.unfinished if cut_off and self.settings.unfinished is not None else mark.joined

    @torch.no_grad()
    def _minibatch(self, answers: Sequence[Answer], rewards: Tensor) -> list[Batch]:
        """This rank's micro-batches of one minibatch, with everything the models say about them before the update.

        Old log-probabilities come from the very forward pass of the update (same rows, same padding, same
        precision), so the first ratio of an iteration is exactly 1 and the first KL exactly 0.
        """
        order = sorted(range(len(answers)), key=lambda i: len(answers[i].completion.prompt)
                       + len(answers[i].completion.tokens))
        mine = mesh.share(order)
        size = self.settings.micro_batch_size
        batches = []
        for start in range(0, len(mine), size):
            some = mine[start:start + size]
            batch = collate([answers[i] for i in some], rewards[some])
            moved = {name: tensor.to(mesh.device()) for name, tensor in batch.items()}
            with mesh.autocast(self.settings.precision):
                logp_BT, _, values_BT = self.models(moved["tokens_BT"], targets_BT=moved["targets_BT"])
                reference_BT = self.reference(moved["tokens_BT"], targets_BT=moved["targets_BT"])
            mask_BT = batch["weights_BT"]
            batch |= {"old_logp_BT": logp_BT.cpu(), "reference_BT": reference_BT.cpu(),
                      "old_values_BT": values_BT.cpu() * mask_BT}
            kl_BT = (batch["old_logp_BT"] - batch["reference_BT"]) * mask_BT
            reward_BT = -self.settings.beta * kl_BT + batch["final_BT"]
            batch["advantages_BT"] = advantages(reward_BT, batch["old_values_BT"], mask_BT, self.settings.gamma,
                                                self.settings.lambda_)
            batch["returns_BT"] = batch["advantages_BT"] + batch["old_values_BT"]
            batches.append(batch)
        return batches

    def _finish(self, minibatches: Sequence[Sequence[Batch]]) -> dict[str, float]:
        """Whiten advantages over the whole iteration and all ranks; statistics of what was sampled."""
        batches = [batch for minibatch in minibatches for batch in minibatch]
        sums = torch.zeros(7, dtype=torch.float64)
        for batch in batches:
            mask, advantage = batch["weights_BT"].double(), batch["advantages_BT"].double()
            kl = ((batch["old_logp_BT"] - batch["reference_BT"]).double() * mask)
            gap = (batch["old_logp_BT"] - batch["engine_BT"]).double().abs() * mask
            sums += torch.stack([mask.sum(), (advantage * mask).sum(), (advantage**2 * mask).sum(), kl.sum(),
                                 kl.abs().sum(), gap.sum(), torch.tensor(float(len(mask)), dtype=torch.float64)])
        count, total, squares, kl_sum, kl_size, gap_sum, rows = mesh.all_sum(sums.to(mesh.device())).tolist()
        mean = total / count
        deviation = max(squares / count - mean * mean, 1e-12) ** 0.5
        for batch in batches:
            batch["advantages_BT"] = (batch["advantages_BT"] - mean) / deviation * batch["weights_BT"]
        if self.iteration == 0 and kl_size != 0.0:
            raise AssertionError(f"before the first update policy and reference must agree, KL is {kl_sum}")
        return {"ppo/kl_reference": kl_sum / rows, "ppo/engine_gap": gap_sum / count}


def collate(answers: Sequence[Answer], rewards: Tensor) -> Batch:
    """Prompts and answers as right-padded rows: inputs, targets, the mask of answers, the score at their last token;
    read_B, the inputs of each row that are no padding."""
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
    return {"tokens_BT": tokens_BT, "targets_BT": targets_BT, "weights_BT": weights_BT, "final_BT": final_BT,
            "engine_BT": engine_BT, "read_B": torch.tensor([prompt + new - 1 for prompt, new in lengths])}


def strip(batch: Batch) -> Batch:
    """What the objective needs of a micro-batch."""
    keep = ("tokens_BT", "targets_BT", "weights_BT", "old_logp_BT", "old_values_BT", "advantages_BT", "returns_BT",
            "read_B")
    return {name: batch[name] for name in keep}


def whiten(values: Tensor) -> Tensor:
    """Mean 0, deviation 1 over the batch (the whitening of equation 4)."""
    return (values - values.mean()) / values.std(correction=0).clamp(min=1e-6)


def advantages(rewards_BT: Tensor, values_BT: Tensor, mask_BT: Tensor, gamma: float, lambda_: float) -> Tensor:
    """Generalised advantage estimates, 0 outside of the mask (Schulman et al. 2016, equation 16).

    delta_t = r_t + gamma V_{t+1} - V_t;  A_t = delta_t + gamma lambda A_{t+1}; beyond the last token both are 0.
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
