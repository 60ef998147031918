"""Rejection sampling (§3.2.3): K answers a prompt from the newest model, the best under the reward
models are kept.

The best temperature is searched afresh for every version, on a few prompts (Figure 8). The answers
kept are joined with the best of all earlier rounds: training on the newest round alone made the
paper's models forget skills. What is written feeds `sft`. The paper gives neither K nor the number
of prompts; 70B samples teach smaller models too.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from pydantic import Field

from llama2.config import StageConfig
from llama2.generate.dialogue import Answer, Chat
from llama2.generate.rewards import RewardModels, Rewards, Score, to_probability
from llama2.records import Dialog, Prompt
from llama2.runs import Run
from llama2.runs.parts import Work
from llama2.stages.common.planning import Cluster, Lineage, sampling_plan
from llama2.stages.common.pool import Pool
from llama2.stages.common.sampling import (
    Sample,
    answer,
    derive_seed,
    keep_fitting,
    keep_scorable,
    load_chat,
    load_rewards,
    make_dialog,
    open_records,
    read_prompts,
    sample_in_parts,
    score,
)
from llama2.tally import Tally

EXAMPLES = 6


class Config(StageConfig):
    """Keep the best of K samples a prompt."""

    policy: Path
    """the newest model"""
    rewards: RewardModels
    prompts: Path
    limit: int | None = Field(None, gt=0)
    """use this many of the prompts, chosen at random"""
    k: int = Field(10, gt=0)
    """answers sampled a prompt"""
    keep: int = Field(1, gt=0)
    """different answers kept a prompt, of this round, and in the pool of all rounds"""
    temperatures: tuple[float, ...] = (1.0, 1.2, 1.3)
    """candidates of the search; one alone is taken without a search"""
    search_prompts: int = Field(64, gt=0)
    """prompts the search spends on each candidate"""
    earlier: tuple[Path, ...] = ()
    """earlier rounds of rejection sampling, whose best answers compete with this round's for the
    pool"""
    finished_only: bool = True
    """an answer cut off by max_tokens cannot be the best; where it can, `sft` learns it without an
    end"""
    sample: Sample = Sample()


def plan(config: Config, cluster: Cluster, lineage: Lineage) -> dict[str, Any]:
    """Memory: policy and reward models whole on every rank."""
    return sampling_plan(
        [lineage.shape(config.policy)],
        [lineage.shape(path) for path in config.rewards.paths()],
        config.sample,
        cluster,
    )


def run(config: Config, run: Run) -> None:
    """Write best.jsonl (this round), pool.jsonl (with earlier rounds) and curves.json."""
    chat = load_chat(config.policy, config.sample, run)
    rewards = load_rewards(config.rewards, chat.tokenizer, run.ranks, config.sample.precision)
    tally = run.tally("prompts")
    prompts = keep_fitting(
        chat, read_prompts(config.prompts, config.limit, config.seed), tally=tally
    )
    prompts = keep_scorable(chat, rewards, prompts, config.sample, tally)
    searched, temperature = search(config, run, chat, rewards, prompts)
    work = sampler(config, chat, rewards, temperature, derive_seed(config.seed, "samples"))
    rows = sample_in_parts(run, [chat], "samples", prompts, work, config.sample, config.k)
    curves, kept = Curves(config.k), 0
    examples: list[dict[str, Any]] = []

    with open_records(run.path / "best.jsonl", run.ranks) as put:
        for prompt, row in zip(prompts, rows, strict=True):
            curves.add(row)
            chosen = best_of(prompt, row)
            for one in chosen:
                put(one)

            kept += len(chosen)
            _count(tally, row, config)
            if chosen and len(examples) < EXAMPLES:
                examples.append(_example(prompt, row))

    run.ranks.barrier()
    pool = Pool(config.keep, config.finished_only, [run.path, *config.earlier])
    sizes = pool.write(run, chat, rewards, config.sample)
    run.write_json(
        "curves.json", {**curves.means(), "temperatures": searched, "temperature": temperature}
    )
    run.write_json(
        "summary.json",
        {
            "prompts": len(prompts),
            "k": config.k,
            "kept": kept,
            "earlier": sum(sizes[1:]),
            "pool": {
                "this round": sizes[0],
                **{str(path): size for path, size in zip(config.earlier, sizes[1:])},
            },
            "temperature": temperature,
            "examples": examples,
        },
    )


def sampler(
    config: Config, chat: Chat, rewards: Rewards, temperature: float, seed: int
) -> Work[Prompt]:
    """What makes a row of each prompt: K answers sampled and scored, of which the best are held on
    to."""

    def work(prompts: Sequence[Prompt], first: int) -> list[dict[str, Any]]:
        answers = answer(
            chat,
            [prompt.messages for prompt in prompts],
            config.sample,
            n=config.k,
            seed=seed,
            temperature=temperature,
            indices=range(first, first + len(prompts)),
        )
        scores = score(rewards, chat.tokenizer, prompts, answers)
        return [
            reduced(mine, marks, config.keep, config.finished_only)
            for mine, marks in zip(answers, scores)
        ]

    return work


def reduced(
    answers: Sequence[Answer], scores: Sequence[Score], keep: int, finished_only: bool
) -> dict[str, Any]:
    """One prompt's row: the reward of each answer, which of them may be kept, the `keep` best of
    those, the worst."""
    rewards = [one.reward for one in scores]
    allowed = [
        bool(one.text) and (one.completion.finish == "stop" or not finished_only) for one in answers
    ]
    best: dict[str, dict[str, Any]] = {}

    for index in sorted(range(len(answers)), key=lambda place: -rewards[place]):
        one = answers[index]
        if allowed[index] and len(best) < keep and one.text not in best:
            best[one.text] = {
                "text": one.text,
                "reward": rewards[index],
                "cut": one.completion.finish != "stop",
            }

    worst = min(range(len(answers)), key=lambda place: rewards[place])
    return {
        "rewards": rewards,
        "allowed": allowed,
        "best": list(best.values()),
        "worst": answers[worst].text,
        "ended": any(one.completion.finish == "stop" for one in answers),
    }


def best_of(prompt: Prompt, row: dict[str, Any]) -> list[Dialog]:
    """The best answers as dialogs, the very best first; none if no answer may be kept."""
    return [
        make_dialog(
            prompt,
            one["text"],
            reward=round(one["reward"], 4),
            safety=prompt.safety,
            **({"cut": True} if one["cut"] else {}),
        )
        for one in row["best"]
    ]


def search(
    config: Config, run: Run, chat: Chat, rewards: Rewards, prompts: Sequence[Prompt]
) -> tuple[dict[str, float], float]:
    """The temperature whose best-of-K reward is highest, with the mean best reward of each
    candidate.

    Only answers that may be kept count. All candidates have the same random numbers, so that they
    differ by nothing but their temperature.
    """
    if len(config.temperatures) == 1:
        return {}, config.temperatures[0]

    few = prompts[:: max(1, len(prompts) // config.search_prompts)][: config.search_prompts]
    rows = {}
    for temperature in config.temperatures:
        work = sampler(config, chat, rewards, temperature, derive_seed(config.seed, "search"))
        rows[str(temperature)] = list(
            sample_in_parts(
                run, [chat], f"search-{temperature}", few, work, config.sample, config.k
            )
        )

    found = dict(zip(rows, best_rewards(list(rows.values()))))
    return found, float(max(found, key=lambda name: found[name]))


def best_rewards(candidates: Sequence[Sequence[dict[str, Any]]]) -> list[float]:
    """The mean best reward of each candidate over the same prompts.

    A prompt of which a candidate may keep nothing counts as the worst answer that any candidate
    gave to it.
    """
    worst = [min(min(row["rewards"]) for row in rows) for rows in zip(*candidates)]
    return [
        statistics.fmean(
            row["best"][0]["reward"] if row["best"] else floor for row, floor in zip(rows, worst)
        )
        for rows in candidates
    ]


class Curves:
    """Expected maximum and median reward of the first k of K samples, k = 1..K (Figure 7), as
    probabilities.

    An answer that may not be kept counts as 0.
    """

    def __init__(self, k: int) -> None:
        self._max, self._median, self._count = [0.0] * k, [0.0] * k, 0

    def add(self, row: dict[str, Any]) -> None:
        """Count one prompt."""
        values = [
            to_probability(reward) if allowed else 0.0
            for reward, allowed in zip(row["rewards"], row["allowed"])
        ]
        self._max = [total + best for total, best in zip(self._max, accumulate(values, max))]
        self._median = [
            total + statistics.median(values[: place + 1])
            for place, total in enumerate(self._median)
        ]
        self._count += 1

    def means(self) -> dict[str, Any]:
        """The curves; empty where there was no prompt."""
        if not self._count:
            return {"k": [], "max": [], "median": []}

        return {
            "k": list(range(1, len(self._max) + 1)),
            "max": [total / self._count for total in self._max],
            "median": [total / self._count for total in self._median],
        }


def _count(tally: Tally, row: dict[str, Any], config: Config) -> None:
    """Count a prompt that keeps nothing, with the cause."""
    if row["best"]:
        return

    tally.kept -= 1
    if row["ended"] or not config.finished_only:
        tally.skip("every answer empty", "see what the policy answers with `llama2 chat`")
    else:
        tally.skip(
            f"no answer ended within {config.sample.max_tokens} tokens",
            "raise sample.max_tokens, or set finished_only to false",
        )


def _example(prompt: Prompt, row: dict[str, Any]) -> dict[str, Any]:
    """A prompt with its worst and its best answer, for the report."""
    return {
        "prompt": prompt.messages[-1].content,
        "worst": row["worst"],
        "best": row["best"][0]["text"],
        "worst_reward": to_probability(min(row["rewards"])),
        "best_reward": to_probability(row["best"][0]["reward"]),
    }
