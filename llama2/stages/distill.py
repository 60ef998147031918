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
from llama2.results import DistilledAnswer, DistillResult
from llama2.runs import Run
from llama2.runs.parts import Work
from llama2.stages.common.planning import Cluster, PlannedRuns, plan_sampling
from llama2.stages.common.preprompts import PREPROMPTS, TEMPLATES, check, under_preprompt
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
from llama2.tally import Tally
from llama2.tokenizer.template import require_system

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


def plan(config: Config, cluster: Cluster, planned: PlannedRuns) -> dict[str, Any]:
    """Return memory: policy and reward models whole on every rank."""
    return plan_sampling(
        [planned.shape(config.policy)],
        [planned.shape(path) for path in config.rewards.paths()],
        config.sample,
        cluster,
    )


def run(config: Config, run: Run) -> None:
    """Write dialogs.jsonl: adversarial prompts with the answers that a preprompt improved."""
    chat = load_chat(config.policy, config.sample, run)
    require_system(chat.tokenizer)
    by_safety = config.rewards.model_copy(update={"rule": "safe"})
    rewards = load_rewards(by_safety, chat.tokenizer, run.ranks, config.sample.precision)
    tally = run.tally("prompts")
    prompts = choose_prompts(config, chat, rewards, tally)
    work = make_sampler(config, chat, rewards)
    rows = sample_in_parts(run, [chat], "samples", prompts, work, config.sample, 1 + config.k)

    before: list[float] = []
    after: list[float] = []
    examples: list[DistilledAnswer] = []
    tally.kept = 0
    with open_records(run.path / "dialogs.jsonl", run.ranks) as write:
        for prompt, row in zip(prompts, rows, strict=True):
            before.append(row["before"])
            after += row["after"]
            best = row["best"]
            if best is None:
                tally.skip(
                    "no answer under a preprompt is safer than the one without",
                    "a larger k gives more chances",
                )
                continue

            write(make_dialog(prompt, best, reward=round(row["reward"], 4), safety=True))
            tally.kept += 1
            if len(examples) < EXAMPLES:
                question = prompt.messages[-1].content
                examples.append(DistilledAnswer(prompt=question, before=row["plain"], after=best))

    run.write_result(
        DistillResult(
            prompts=len(prompts),
            kept=tally.kept,
            templated=sum(find_risk(prompt) in config.templates for prompt in prompts),
            safety_before=_median(before),
            safety_after=_median(after),
            examples=examples,
        )
    )


def choose_prompts(config: Config, chat: Chat, rewards: Rewards, tally: Tally) -> list[Prompt]:
    """Choose the adversarial prompts that leave room for an answer, alone and under each of their
    preprompts."""
    every = read_prompts(config.prompts, None, config.seed)
    adversarial = [prompt for prompt in every if is_adversarial(prompt, config.families)]
    tally.skip("not adversarial", count=len(every) - len(adversarial))
    alone = keep_fitting(chat, adversarial, ROOM, tally)
    alone = keep_scorable(chat, rewards, alone, config.sample, tally)
    tally.read = len(every)

    prompts = []
    for prompt in alone:
        questions = (add_preprompt(prompt, config, turn) for turn in range(config.k))
        if all(chat.has_room(messages, ROOM) for messages in questions):
            prompts.append(prompt)

    tally.skip(
        "no room in the context beside the preprompt",
        "give shorter preprompts and templates, or a model with a longer context",
        len(alone) - len(prompts),
    )
    within = prompts[: config.limit]
    tally.skip("over the limit", count=len(prompts) - len(within))
    return within


def make_sampler(config: Config, chat: Chat, rewards: Rewards) -> Work[Prompt]:
    """Return what makes a row of each prompt: its safety score without and under each preprompt,
    and the best answer."""

    def work(prompts: Sequence[Prompt], first: int) -> list[dict[str, Any]]:
        places = range(first, first + len(prompts))

        def sample(questions: Sequence[Messages], *use: object) -> list[tuple[Answer, float]]:
            """Answer the questions; the answers are judged as answers to the bare prompts."""
            seed = seed_use(config.seed, *use)
            answers = answer(chat, questions, config.sample, seed=seed, indices=places)
            scores = score(rewards, chat.tokenizer, prompts, answers)
            return [(row[0], marks[0].safe) for row, marks in zip(answers, scores)]

        rows: list[dict[str, Any]] = []
        for plain, safe in sample([prompt.messages for prompt in prompts], "plain"):
            start = {"before": safe, "after": [], "reward": safe}
            rows.append({"plain": plain.text, "best": None, **start})

        for turn in range(config.k):
            questions = [add_preprompt(prompt, config, turn) for prompt in prompts]
            for row, (other, safe) in zip(rows, sample(questions, "preprompted", turn)):
                row["after"].append(safe)
                ended = other.completion.finish == "stop"
                new = other.text and other.text != row["plain"]
                if ended and new and safe > row["reward"]:
                    row["best"], row["reward"] = other.text, safe

        return rows

    return work


def is_adversarial(prompt: Prompt, families: Sequence[str]) -> bool:
    """Tell whether a prompt tries to get something unsafe: by its family, else by its tag."""
    family = prompt.metadata.get("family")
    return prompt.safety if family is None else family in families


def find_risk(prompt: Prompt) -> str:
    """Find the risk category of a prompt, "" where it is not known."""
    return str(prompt.metadata.get("risk", ""))


def add_preprompt(prompt: Prompt, config: Config, turn: int) -> Messages:
    """Return what is asked for the answer number `turn`."""
    seed = seed_use(config.seed, "preprompt", turn)
    return under_preprompt(prompt, seed, config.preprompts, config.templates)


def _median(scores: Sequence[float]) -> float | None:
    return statistics.median(map(to_probability, scores)) if scores else None
