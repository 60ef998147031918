"""Rejection sampling (§3.2.3): of K answers a prompt from the newest model, the best under the
reward models are kept.

The best temperature is searched afresh for every version, on a few prompts (Figure 8). The answers
kept are joined with the best of all earlier rounds: training on the newest round alone made the
paper's models forget skills. What is written feeds `sft`. The paper gives neither K nor the number
of prompts; 70B samples teach smaller models too.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

from pydantic import Field

from llama2.config import StageConfig
from llama2.generate.dialogue import Answer, Chat
from llama2.generate.rewards import RewardModels, Rewards, Score, to_probability
from llama2.records import Dialog, Prompt
from llama2.results import CurvesResult, RankedAnswers, RejectionResult
from llama2.runs import Run
from llama2.runs.parts import Work
from llama2.stages.common.planning import Cluster, PlannedRuns, plan_sampling
from llama2.stages.common.pool import Pool
from llama2.stages.common.sampling import (
    Sample,
    answer,
    keep_fitting,
    keep_scorable,
    load_chat,
    load_rewards,
    make_dialog,
    open_records,
    read_prompts,
    sample_in_parts,
    score,
    seed_use,
)

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


def plan(config: Config, cluster: Cluster, planned: PlannedRuns) -> dict[str, Any]:
    """Return memory: policy and reward models whole on every rank."""
    return plan_sampling(
        [planned.shape(config.policy)],
        [planned.shape(path) for path in config.rewards.paths()],
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
    means, temperature = search(config, run, chat, rewards, prompts)
    work = make_sampler(config, chat, rewards, temperature, seed_use(config.seed, "samples"))
    rows = sample_in_parts(run, [chat], "samples", prompts, work, config.sample, config.k)

    curves, kept_answers = Curves(config.k), 0
    examples: list[RankedAnswers] = []
    with open_records(run.path / "best.jsonl", run.ranks) as write:
        for prompt, row in zip(prompts, rows, strict=True):
            curves.add(row)
            dialogs = make_dialogs(prompt, row)
            for best in dialogs:
                write(best)

            kept_answers += len(dialogs)
            if not dialogs:
                tally.kept -= 1
                tally.skip(*explain_nothing(row, config))
            elif len(examples) < EXAMPLES:
                examples.append(make_example(prompt, row))

    run.ranks.barrier()
    pool = Pool(config.keep, config.finished_only, [run.path, *config.earlier])
    size, *earlier = pool.write(run, chat, rewards, config.sample)
    run.write_result(CurvesResult(temperatures=means, temperature=temperature, **curves.means()))
    run.write_result(
        RejectionResult(
            prompts=len(prompts),
            k=config.k,
            kept=kept_answers,
            earlier=sum(earlier),
            pool={"this round": size, **dict(zip(map(str, config.earlier), earlier))},
            temperature=temperature,
            examples=examples,
        )
    )


# --- sampling ---
Row = dict[str, Any]
"""one prompt: the reward of each answer, which may be kept, the best of those, the worst"""


def make_sampler(
    config: Config, chat: Chat, rewards: Rewards, temperature: float, seed: int
) -> Work[Prompt]:
    """Return what makes a row of each prompt: K answers are sampled and scored, and the best
    stay."""

    def work(prompts: Sequence[Prompt], first: int) -> list[Row]:
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
            rank_answers(row, marks, config.keep, config.finished_only)
            for row, marks in zip(answers, scores)
        ]

    return work


def rank_answers(
    answers: Sequence[Answer], scores: Sequence[Score], keep: int, finished_only: bool
) -> Row:
    """Return one prompt's row with the `keep` best different answers of those that may be kept."""
    rewards = [each.reward for each in scores]
    ended = [each.completion.finish == "stop" for each in answers]
    allowed = [bool(each.text) and (end or not finished_only) for each, end in zip(answers, ended)]

    order = sorted(range(len(answers)), key=lambda place: -rewards[place])
    best: dict[str, Row] = {}
    for place in order:
        text = answers[place].text
        if allowed[place] and len(best) < keep and text not in best:
            best[text] = {"text": text, "reward": rewards[place], "cut": not ended[place]}

    worst = min(range(len(answers)), key=lambda place: rewards[place])
    return {
        "rewards": rewards,
        "allowed": allowed,
        "best": list(best.values()),
        "worst": answers[worst].text,
        "ended": any(ended),
    }


def make_dialogs(prompt: Prompt, row: Row) -> list[Dialog]:
    """Return the best answers as dialogs, the very best first; none if no answer may be kept."""
    dialogs = []
    for best in row["best"]:
        marks = {"cut": True} if best["cut"] else {}
        reward = round(best["reward"], 4)
        dialogs.append(
            make_dialog(prompt, best["text"], reward=reward, safety=prompt.safety, **marks)
        )

    return dialogs


def explain_nothing(row: Row, config: Config) -> tuple[str, str]:
    """Say why a prompt keeps no answer, and what would help."""
    if row["ended"] or not config.finished_only:
        return "every answer empty", "see what the policy answers with `llama2 chat`"

    return (
        f"no answer ended within {config.sample.max_tokens} tokens",
        "raise sample.max_tokens, or set finished_only to false",
    )


def make_example(prompt: Prompt, row: Row) -> RankedAnswers:
    """Return a prompt with its worst and its best answer, for the report."""
    best = row["best"][0]
    return RankedAnswers(
        prompt=prompt.messages[-1].content,
        worst=row["worst"],
        best=best["text"],
        worst_reward=to_probability(min(row["rewards"])),
        best_reward=to_probability(best["reward"]),
    )


# --- the search for a temperature ---
def search(
    config: Config, run: Run, chat: Chat, rewards: Rewards, prompts: Sequence[Prompt]
) -> tuple[dict[str, float], float]:
    """Find the temperature whose best-of-K reward is highest; return the mean best reward of each
    candidate, and the temperature.

    Only answers that may be kept count. All candidates have the same random numbers, so that they
    differ by nothing but their temperature.
    """
    if len(config.temperatures) == 1:
        return {}, config.temperatures[0]

    stride = max(1, len(prompts) // config.search_prompts)
    few = prompts[::stride][: config.search_prompts]
    rows = []
    for temperature in config.temperatures:
        name = f"search-{temperature}"
        work = make_sampler(config, chat, rewards, temperature, seed_use(config.seed, "search"))
        rows.append(list(sample_in_parts(run, [chat], name, few, work, config.sample, config.k)))

    means = dict(zip(config.temperatures, average_best(rows)))
    best = max(means, key=lambda temperature: means[temperature])
    return {str(temperature): mean for temperature, mean in means.items()}, best


def average_best(candidates: Sequence[Sequence[Row]]) -> list[float]:
    """Return the mean best reward of each candidate over the same prompts.

    A prompt of which a candidate may keep nothing counts as the worst answer that any candidate
    gave to it.
    """
    worst = []
    for rows in zip(*candidates):
        worst.append(min(chain.from_iterable(row["rewards"] for row in rows)))

    means = []
    for candidate in candidates:
        best = [
            row["best"][0]["reward"] if row["best"] else floor
            for row, floor in zip(candidate, worst)
        ]
        means.append(statistics.fmean(best))

    return means


class Curves:
    """Expected maximum and median reward of the first k of K samples, k = 1..K (Figure 7), as
    probabilities.

    An answer that may not be kept counts as 0.
    """

    def __init__(self, k: int) -> None:
        self._max, self._median, self._count = [0.0] * k, [0.0] * k, 0

    def add(self, row: Row) -> None:
        """Count one prompt."""
        values = [
            to_probability(reward) if allowed else 0.0
            for reward, allowed in zip(row["rewards"], row["allowed"])
        ]
        self._count += 1
        for place, best in enumerate(accumulate(values, max)):
            self._max[place] += best
            self._median[place] += statistics.median(values[: place + 1])

    def means(self) -> dict[str, list[Any]]:
        """Return the curves; empty where there was no prompt."""
        if not self._count:
            return {"k": [], "max": [], "median": []}

        best = [total / self._count for total in self._max]
        median = [total / self._count for total in self._median]
        return {"k": list(range(1, len(best) + 1)), "max": best, "median": median}
