"""Safety context distillation (§4.2.4): answer adversarial prompts under a safety preprompt, learn
without it.

Behind the preprompt stands the answer template of the prompt's risk category, where that is known.
An answer is kept only if the safety reward model scores it above the answer given without any
preprompt, since on good answers distillation would only make the model vaguer. What is written
feeds `sft`.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from llama2.config import StageConfig
from llama2.generate.dialogue import Answer, Chat
from llama2.generate.rewards import RewardModels, Rewards, to_probability
from llama2.records import Messages, Prompt
from llama2.runs import Run
from llama2.runs.parts import Work
from llama2.stages.common.planning import Cluster, Lineage, sampling_plan
from llama2.stages.common.preprompts import PREPROMPTS, TEMPLATES, check, under_preprompt
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

ROOM = 48  # tokens that an answer needs
EXAMPLES = 6


class Config(StageConfig):
    """Distil the effect of safety preprompts into the model."""

    policy: Path
    rewards: RewardModels
    """its safety model is the gate"""
    prompts: Path
    limit: int | None = Field(None, gt=0)
    """use this many of the adversarial prompts"""
    families: tuple[str, ...] = ("unsafe",)
    """where prompts carry metadata.family, use these alone; elsewhere every prompt tagged for
    safety"""
    k: int = Field(1, gt=0)
    """answers under preprompts, each with another one; the best is kept"""
    preprompts: tuple[str, ...] = PREPROMPTS
    """with {a} and {b} for two adjectives"""
    templates: dict[str, str] = TEMPLATES
    """risk category (metadata.risk of a prompt) -> answer template behind the preprompt; {} for
    none"""
    sample: Sample = Sample(temperature=0.7)

    _fields = field_validator("preprompts")(check)


def plan(config: Config, cluster: Cluster, lineage: Lineage) -> dict[str, Any]:
    """Memory: policy and reward models whole on every rank."""
    return sampling_plan(
        [lineage.shape(config.policy)],
        [lineage.shape(path) for path in config.rewards.paths()],
        config.sample,
        cluster,
    )


def run(config: Config, run: Run) -> None:
    """Write dialogs.jsonl: adversarial prompts with the answers that a preprompt improved."""
    chat = load_chat(config.policy, config.sample, run)
    by_safety = config.rewards.model_copy(update={"rule": "safe"})
    rewards = load_rewards(by_safety, chat.tokenizer, run.ranks, config.sample.precision)
    tally = run.tally("prompts")
    prompts = chosen(config, chat, rewards, tally)
    rows = sample_in_parts(
        run, [chat], "samples", prompts, sampler(config, chat, rewards), config.sample, 1 + config.k
    )
    before: list[float] = []
    after: list[float] = []
    examples: list[dict[str, str]] = []
    kept = 0

    with open_records(run.path / "dialogs.jsonl", run.ranks) as put:
        for prompt, row in zip(prompts, rows, strict=True):
            before.append(row["before"])
            after += row["after"]
            if row["best"] is None:
                tally.skip(
                    "no answer under a preprompt is safer than the one without",
                    "a larger k gives more chances",
                )
                continue

            put(make_dialog(prompt, row["best"], reward=round(row["reward"], 4), safety=True))
            kept += 1
            if len(examples) < EXAMPLES:
                examples.append(
                    {
                        "prompt": prompt.messages[-1].content,
                        "before": row["plain"],
                        "after": row["best"],
                    }
                )

    tally.kept = kept
    run.write_json(
        "summary.json",
        {
            "prompts": len(prompts),
            "kept": kept,
            "templated": sum(risk_of(one) in config.templates for one in prompts),
            "safety before": _median(before),
            "safety after": _median(after),
            "examples": examples,
        },
    )


def chosen(config: Config, chat: Chat, rewards: Rewards, tally: Tally) -> list[Prompt]:
    """The adversarial prompts that leave room for an answer, alone and under each of their
    preprompts."""
    found = read_prompts(config.prompts, None, config.seed)
    some = [prompt for prompt in found if adversarial(prompt, config.families)]
    tally.skip("not adversarial", count=len(found) - len(some))
    bare = keep_scorable(chat, rewards, keep_fitting(chat, some, ROOM, tally), config.sample, tally)
    tally.read = len(found)
    kept = [
        prompt
        for prompt in bare
        if all(chat.has_room(preprompted(prompt, config, turn), ROOM) for turn in range(config.k))
    ]
    tally.skip(
        "no room in the context beside the preprompt",
        "give shorter preprompts and templates, or a model with a longer context",
        len(bare) - len(kept),
    )
    tally.skip("over the limit", count=len(kept) - len(kept[: config.limit]))

    return kept[: config.limit]


def sampler(config: Config, chat: Chat, rewards: Rewards) -> Work[Prompt]:
    """What makes a row of each prompt: its safety score without and under each preprompt, and the
    best answer."""

    def work(prompts: Sequence[Prompt], first: int) -> list[dict[str, Any]]:
        def scored(asked: Sequence[Messages], *use: object) -> tuple[list[Answer], list[float]]:
            answers = answer(
                chat,
                asked,
                config.sample,
                seed=derive_seed(config.seed, *use),
                indices=range(first, first + len(prompts)),
            )
            # judged as answers to the bare prompt
            marks = score(rewards, chat.tokenizer, prompts, answers)
            return [one[0] for one in answers], [one[0].safe for one in marks]

        plain, before = scored([prompt.messages for prompt in prompts], "plain")
        rows: list[dict[str, Any]] = [
            {"plain": one.text, "before": mark, "after": [], "best": None, "reward": mark}
            for one, mark in zip(plain, before)
        ]
        for turn in range(config.k):
            for row, one, mark in zip(
                rows,
                *scored(
                    [preprompted(prompt, config, turn) for prompt in prompts], "preprompted", turn
                ),
            ):
                row["after"].append(mark)
                usable = one.completion.finish == "stop" and one.text and one.text != row["plain"]
                if usable and mark > row["reward"]:
                    row["best"], row["reward"] = one.text, mark

        return rows

    return work


def adversarial(prompt: Prompt, families: Sequence[str]) -> bool:
    """Whether a prompt tries to get something unsafe: by its family, else by its tag."""
    family = prompt.metadata.get("family")
    return prompt.safety if family is None else family in families


def risk_of(prompt: Prompt) -> str:
    """The risk category of a prompt, "" where it is not known."""
    return str(prompt.metadata.get("risk", ""))


def preprompted(prompt: Prompt, config: Config, turn: int) -> Messages:
    """What is asked for the answer number `turn`."""
    return under_preprompt(
        prompt, derive_seed(config.seed, "preprompt", turn), config.preprompts, config.templates
    )


def _median(scores: Sequence[float]) -> float | None:
    return statistics.median(map(to_probability, scores)) if scores else None
