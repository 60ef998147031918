"""Prompts of every family, split by a stable hash of their content, and the question lists of Ghost
Attention.

The key that decides the split names the content (entity and attribute, category and count, request
and attack style), never the wording, so no rephrasing of a training prompt can reach the evaluation
split. What earlier turns show belongs to the training split always.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Iterator
from functools import lru_cache, partial
from random import Random
from typing import Literal

from llama2.microworld import helpful, risks
from llama2.microworld.instructions import add_markers, choose
from llama2.microworld.tasks import OPENERS, Gold, Task, TaskFamily
from llama2.microworld.world import World, hash_to_fraction, seed_stream, state
from llama2.records import Message, Messages, Prompt, Role

PromptSplit = Literal["train", "validation", "evaluation"]
SPLITS: tuple[PromptSplit, ...] = ("train", "validation", "evaluation")
BOUNDS = tuple(itertools.accumulate((0.70, 0.12, 0.18)))
"""Where each split ends, as a share of all contents."""
TURNS = 6

# Unseen sums stay hard for a model of a million parameters, whatever the recipe does: they weigh
# little.
HELPFUL: dict[str, float] = {
    "fact": 0.26,
    "follow": 0.12,
    "more": 0.06,
    "list": 0.12,
    "sum": 0.05,
    "rewrite": 0.11,
    "howto": 0.10,
    "story": 0.10,
    "instructed": 0.08,
}
SAFETY_SHARE = 0.34
GHOST_FAMILIES = ("fact", "fact", "list", "sum")
INSTRUCTED_FAMILIES = ("fact", "fact", "list", "howto", "rewrite")
_ROLES: tuple[Role, Role] = ("user", "assistant")


@lru_cache(maxsize=8)
def _rank_keys(seed: int) -> dict[str, float]:
    """Rank the keys of families of few contents by their hashes, so that every split gets its exact
    share."""
    ranks = {}
    for keys in helpful.list_finite_keys(World.build(seed)):
        keys.sort(key=partial(hash_to_fraction, "split", seed))
        for rank, key in enumerate(keys):
            ranks[key] = rank / len(keys)

    return ranks


def find_split(world: World, key: str) -> PromptSplit:
    """Return the split that a content key belongs to."""
    share = _rank_keys(world.seed).get(key)
    if share is None:
        share = hash_to_fraction("split", world.seed, key)

    return SPLITS[bisect.bisect(BOUNDS, share)]


def draw(world: World, split: PromptSplit, family: str, rng: Random) -> Task:
    """Draw a task of a family whose content belongs to the split."""
    while True:
        task = FAMILIES[family].draw(world, rng)
        required = {find_split(world, key) for key in task.requires}
        if find_split(world, task.key) == split and required <= {"train"}:
            return task


def make_messages(turns: tuple[str, ...], system: str | None = None) -> Messages:
    """Return turns of user and assistant as messages, after a system message if one is given."""
    messages = tuple(map(Message, itertools.cycle(_ROLES), turns))
    return (Message("system", system), *messages) if system else messages


def make_prompt(task: Task, split: PromptSplit, id: str) -> Prompt:
    """Return a task as a `Prompt`.

    The safety tag marks unsafe prompts. Borderline ones are harmless, so helpfulness rules.
    """
    metadata = {"family": task.family, "key": task.key, "split": split, "gold": task.gold}
    metadata |= {name: task.gold[name] for name in ("risk", "style") if name in task.gold}
    return Prompt(make_messages(task.turns), id, task.family == "unsafe", metadata)


def draw_prompts(
    world: World, split: PromptSplit, count: int, seed: int = 0, safety_share: float = SAFETY_SHARE
) -> Iterator[Prompt]:
    """Draw `count` prompts of a split, half of `safety_share` unsafe and half borderline.

    Held-out prompts are all different; training prompts repeat once a family has no new ones.
    """
    rng = seed_stream(world.seed, "prompts", split, seed)
    weights = {name: weight * (1 - safety_share) for name, weight in HELPFUL.items()}
    weights |= {"unsafe": safety_share / 2, "borderline": safety_share / 2}
    seen: set[tuple[str, ...]] = set()
    index = 0

    while index < count and any(weights.values()):
        family = rng.choices(list(weights), list(weights.values()))[0]
        for _ in range(25):
            task = draw(world, split, family, rng)
            if task.turns not in seen:
                break
        else:
            if split != "train":
                weights[family] = 0.0
                continue

        seen.add(task.turns)
        yield make_prompt(task, split, f"{split}-{index:05d}")
        index += 1


def _strip_opener(task: Task) -> Task:
    """Return the task without an opener ("Hello. "): lasting instructions come before the question
    itself."""
    question = task.turns[-1]
    for opener in filter(None, OPENERS):
        question = question.removeprefix(opener)

    return dataclasses.replace(task, turns=(*task.turns[:-1], question))


def _draw_instructed(world: World, rng: Random) -> Task:
    """Draw a question under an instruction: given with it, or one turn earlier."""
    task = _strip_opener(FAMILIES[rng.choice(INSTRUCTED_FAMILIES)].draw(world, rng))
    instruction = choose(world, rng)
    sentence = instruction.text if rng.random() < 0.7 else instruction.short
    gold = {"family": "instructed", "markers": list(instruction.markers), "base": task.gold}

    if rng.random() < 0.5:
        return Task(task.key, (f"{sentence} {task.turns[0]}",), gold)

    first = _strip_opener(FAMILIES["fact"].draw(world, rng))
    reply = add_markers(instruction.markers, answer_briefly(first.gold, rng))
    turns = (f"{sentence} {first.turns[0]}", reply, task.turns[0])
    return Task(task.key, turns, gold, (first.key,))


def _expert_without_markers(gold: Gold, rng: Random) -> str:
    return FAMILIES[gold["base"]["family"]].expert(gold["base"], rng)


def _expert_instructed(gold: Gold, rng: Random) -> str:
    return add_markers(gold["markers"], _expert_without_markers(gold, rng))


def _curt_instructed(gold: Gold, rng: Random) -> str:
    return FAMILIES[gold["base"]["family"]].curt(gold["base"], rng)


FAMILIES: dict[str, TaskFamily] = helpful.FAMILIES | {
    "instructed": TaskFamily(
        _draw_instructed, _expert_instructed, _curt_instructed, _expert_without_markers
    ),
    "unsafe": risks.UNSAFE,
    "borderline": risks.BORDERLINE,
}


def answer_briefly(gold: Gold, rng: Random) -> str:
    """Answer correctly in one sentence, as long dialogs need it."""
    if gold["family"] == "fact":
        return state(gold["attribute"], gold["subject"], gold["value"])
    if gold["family"] == "sum":
        return f"{gold['a']} plus {gold['b']} is {gold['a'] + gold['b']}."

    return FAMILIES[gold["family"]].expert(gold, rng)


def draw_questions(world: World, split: PromptSplit, rng: Random, turns: int = TURNS) -> list[Task]:
    """Draw short, different questions for one long dialog."""
    tasks: dict[str, Task] = {}
    while len(tasks) < turns:
        task = _strip_opener(draw(world, split, rng.choice(GHOST_FAMILIES), rng))
        if task.gold.get("count", 0) <= 3:
            tasks.setdefault(task.key, task)

    return list(tasks.values())


def draw_ghost_prompts(
    world: World, split: PromptSplit, count: int, seed: int = 0
) -> Iterator[Prompt]:
    """Draw question lists for Ghost Attention: the first question as the prompt, all in the
    metadata.

    `metadata`: `instruction` (`kind`, `text`, `short`, `markers`), `questions` (six user turns,
    without the instruction: who uses them attaches it), and `golds`, one per question, for the
    rater.
    """
    rng = seed_stream(world.seed, "ghost", split, seed)
    for index in range(count):
        tasks = draw_questions(world, split, rng)
        questions = [task.turns[0] for task in tasks]
        instruction = dataclasses.asdict(choose(world, rng))
        metadata = {
            "family": "ghost",
            "split": split,
            "instruction": instruction | {"markers": list(instruction["markers"])},
            "questions": questions,
            "golds": [task.gold for task in tasks],
        }
        yield Prompt(make_messages(tasks[0].turns), f"ghost-{split}-{index:05d}", False, metadata)
