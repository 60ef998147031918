"""Rejection sampling (§3.2.3): K answers a prompt from the newest model, the best under the reward models is kept.

The best temperature is searched afresh for every version, on a few prompts (Figure 8). The answers kept are joined
with the best of all earlier rounds: training on the newest round alone made the paper's models forget skills. What is
written feeds `sft`. The paper gives neither K nor the number of prompts; 70B samples teach smaller models too.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from llama2 import records
from llama2.config import StageConfig
from llama2.generate.dialogue import Answer, Chat
from llama2.generate.rewards import RewardModels, Rewards, Score, probability
from llama2.records import Dialog, Prompt
from llama2.runs import Run, is_output
from llama2.stages.planning import Cluster, Lineage, sampling_plan
from llama2.stages.sampling import (
    Sample,
    answer,
    dialog,
    fitting,
    load_chat,
    load_rewards,
    read_prompts,
    score,
    write_records,
)
from llama2.tokenizer.template import encode_dialog


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
    temperatures: tuple[float, ...] = (1.0, 1.2, 1.3)
    """candidates of the search; one alone is taken without a search"""
    search_prompts: int = Field(64, gt=0)
    """prompts the search spends on each candidate"""
    earlier: tuple[Path, ...] = ()
    """earlier rounds of rejection sampling whose best answers join the pool"""
    finished_only: bool = True
    """an answer cut off by max_tokens cannot be the best"""
    sample: Sample = Sample()


def plan(config: Config, cluster: Cluster, lineage: Lineage) -> dict[str, Any]:
    """Memory: policy and reward models whole on every rank."""
    return sampling_plan([lineage.shape(config.policy)], [lineage.shape(path) for path in config.rewards.paths()],
                         config.sample, cluster)


def run(config: Config, run: Run) -> None:
    """Write best.jsonl (this round), pool.jsonl (with earlier rounds) and curves.json."""
    chat = load_chat(config.policy, config.sample, run)
    rewards = load_rewards(config.rewards, chat.tokenizer, config.sample.precision)
    prompts = fitting(chat, read_prompts(config.prompts, config.limit, config.seed))
    searched, temperature = search(config, chat, rewards, prompts)
    answers = answer(chat, [prompt.messages for prompt in prompts], config.sample, n=config.k,
                     temperature=temperature, seed=config.seed)
    scores = score(rewards, chat.tokenizer, prompts, answers)
    best = [kept for prompt, mine, marks in zip(prompts, answers, scores)
            if (kept := best_of(prompt, mine, marks, config.finished_only)) is not None]
    old = _rescored(config, rewards, chat, {_key(one) for one in best})
    write_records(run.path / "best.jsonl", best)
    write_records(run.path / "pool.jsonl", best + old)
    run.write_json("curves.json", {**curves(scores), "temperatures": searched, "temperature": temperature})
    run.write_json("summary.json", {"prompts": len(prompts), "k": config.k, "kept": len(best), "earlier": len(old),
                                    "temperature": temperature, "examples": _examples(prompts, answers, scores)})


def search(config: Config, chat: Chat, rewards: Rewards, prompts: Sequence[Prompt]) -> tuple[dict[str, float], float]:
    """The temperature whose best-of-K reward is highest, with the mean best reward of each candidate."""
    if len(config.temperatures) == 1:
        return {}, config.temperatures[0]
    found = {}
    few = prompts[:: max(1, len(prompts) // config.search_prompts)][: config.search_prompts]
    for temperature in config.temperatures:
        answers = answer(chat, [prompt.messages for prompt in few], config.sample, n=config.k,
                         temperature=temperature, seed=config.seed + 1)
        marks = score(rewards, chat.tokenizer, few, answers)
        found[str(temperature)] = statistics.fmean(max(one.joined for one in mine) for mine in marks)
    return found, float(max(found, key=lambda name: found[name]))


def best_of(prompt: Prompt, answers: Sequence[Answer], scores: Sequence[Score], finished_only: bool) -> Dialog | None:
    """The best answer as a dialog; None if no answer may be kept."""
    allowed = [index for index, one in enumerate(answers)
               if one.text and (one.completion.finish == "stop" or not finished_only)]
    if not allowed:
        return None
    best = max(allowed, key=lambda index: scores[index].joined)
    return dialog(prompt, answers[best].text, reward=round(scores[best].joined, 4), safety=prompt.safety)


def curves(scores: Sequence[Sequence[Score]]) -> dict[str, Any]:
    """Expected maximum and median reward of the first k of K samples, k = 1..K (Figure 7), as probabilities."""
    k = len(scores[0]) if scores else 0
    values = [[probability(one.joined) for one in mine] for mine in scores]
    return {"k": list(range(1, k + 1)),
            "max": [statistics.fmean(max(mine[:count]) for mine in values) for count in range(1, k + 1)],
            "median": [statistics.fmean(statistics.median(mine[:count]) for mine in values)
                       for count in range(1, k + 1)]}


def _key(one: Dialog) -> str:
    """What a dialog answers: the same prompt in two rounds has the same key."""
    return records.to_json(Prompt(one.messages[:-1]))


def _rescored(config: Config, rewards: Rewards, chat: Chat, taken: set[str]) -> list[Dialog]:
    """The best answers of earlier rounds to prompts not sampled now; the newest reward models choose between rounds."""
    files = [path / "best.jsonl" for path in config.earlier]
    pool = [one for file in files for one in records.read(Dialog, file, may_be_empty=is_output(file))]
    pool = [one for one in pool if _key(one) not in taken]
    rows = [encode_dialog(chat.tokenizer, one.messages)[0] for one in pool]
    marks = rewards(rows, [bool(one.metadata.get("safety")) for one in pool]) if pool else []
    best: dict[str, tuple[float, Dialog]] = {}
    for one, mark in zip(pool, marks):
        if _key(one) not in best or mark.joined > best[_key(one)][0]:
            best[_key(one)] = (mark.joined, one)
    return [one for _, one in best.values()]


def _examples(prompts: Sequence[Prompt], answers: Sequence[Sequence[Answer]],
              scores: Sequence[Sequence[Score]]) -> list[dict[str, Any]]:
    """A few prompts with their worst and best answers, for the report."""
    shown = []
    for prompt, mine, marks in list(zip(prompts, answers, scores))[:6]:
        order = sorted(range(len(mine)), key=lambda index: marks[index].joined)
        shown.append({"prompt": prompt.messages[-1].content, "worst": mine[order[0]].text, "best": mine[order[-1]].text,
                      "worst_reward": probability(marks[order[0]].joined),
                      "best_reward": probability(marks[order[-1]].joined)})
    return shown
