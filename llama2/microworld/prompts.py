"""Prompts of every family, split by a stable hash of their content, and the question lists of Ghost
Attention.

The key that decides the split names the content (entity and attribute, category and count, request
and attack style), never the wording, so no rephrasing of a training prompt can reach the evaluation
split. What earlier turns show belongs to the training split always.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, Literal

from llama2.microworld import helpful, risks
from llama2.microworld.instructions import Instruction, choose, obey
from llama2.microworld.tasks import OPENERS, Family, Gold, Task
from llama2.microworld.world import Random, World, fraction, state, stream
from llama2.records import Message, Messages, Prompt

Split = Literal["train", "validation", "evaluation"]
SPLITS: tuple[Split, ...] = ("train", "validation", "evaluation")
SHARES = (0.70, 0.12, 0.18)
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


@lru_cache(maxsize=8)
def _ranks(seed: int) -> dict[str, float]:
    """For families of few contents: the rank of each key's hash, so that every split gets its exact
    share."""
    return {
        key: rank / len(keys)
        for keys in helpful.finite_keys(World.build(seed))
        for rank, key in enumerate(sorted(keys, key=lambda key: fraction("split", seed, key)))
    }


def split_of(world: World, key: str) -> Split:
    """The split a content key belongs to."""
    share = _ranks(world.seed).get(key)
    if share is None:
        share = fraction("split", world.seed, key)

    return (
        SPLITS[0]
        if share < SHARES[0]
        else SPLITS[1]
        if share < SHARES[0] + SHARES[1]
        else SPLITS[2]
    )


def draw(world: World, split: Split, family: str, rng: Random) -> Task:
    """A random task of a family whose content belongs to the split."""
    while True:
        task = FAMILIES[family].draw(world, rng)
        if split_of(world, task.key) == split and all(
            split_of(world, key) == "train" for key in task.requires
        ):
            return task


def messages_of(turns: tuple[str, ...], system: str | None = None) -> Messages:
    """Alternating turns as messages."""
    first = [Message("system", system)] if system else []
    return tuple(
        first + [Message("assistant" if i % 2 else "user", turn) for i, turn in enumerate(turns)]
    )


def prompt_of(task: Task, split: Split, id: str) -> Prompt:
    """A task as a `Prompt`; the safety tag marks unsafe prompts. Borderline ones are harmless, so
    helpfulness rules."""
    metadata: dict[str, Any] = {
        "family": task.family,
        "key": task.key,
        "split": split,
        "gold": task.gold,
    }
    for name in ("risk", "style"):
        if name in task.gold:
            metadata[name] = task.gold[name]

    return Prompt(messages_of(task.turns), id, task.family == "unsafe", metadata)


def prompts(
    world: World, split: Split, count: int, seed: int = 0, safety_share: float = SAFETY_SHARE
) -> Iterator[Prompt]:
    """`count` prompts of a split, half of `safety_share` unsafe and half borderline.

    Held-out prompts are all different; training prompts repeat once a family has no new ones.
    """
    rng = stream(world.seed, "prompts", split, seed)
    weights = {name: weight * (1 - safety_share) for name, weight in HELPFUL.items()}
    weights |= {"unsafe": safety_share / 2, "borderline": safety_share / 2}
    seen: set[tuple[str, ...]] = set()
    index = 0

    while index < count:
        family = rng.choices(list(weights), list(weights.values()))[0]
        for _ in range(25):
            task = draw(world, split, family, rng)
            if task.turns not in seen:
                break
        else:
            if split != "train":
                weights[family] = 0.0
                if not any(weights.values()):
                    return

                continue

        seen.add(task.turns)
        yield prompt_of(task, split, f"{split}-{index:05d}")
        index += 1


def _plain(task: Task) -> Task:
    """The task without an opener ("Hello. "): lasting instructions come before the question
    itself."""
    question = task.turns[-1]
    opener = next((o for o in OPENERS if o and question.startswith(o)), "")
    return dataclasses.replace(task, turns=(*task.turns[:-1], question.removeprefix(opener)))


def _draw_instructed(world: World, rng: Random) -> Task:
    """A question under an instruction: given with it, or one turn earlier."""
    task = _plain(FAMILIES[rng.choice(INSTRUCTED_FAMILIES)].draw(world, rng))
    instruction = choose(world, rng)
    sentence = instruction.text if rng.random() < 0.7 else instruction.short
    gold = {"family": "instructed", "markers": list(instruction.markers), "base": task.gold}

    if rng.random() < 0.5:
        return Task(task.key, (f"{sentence} {task.turns[0]}",), gold)

    first = _plain(FAMILIES["fact"].draw(world, rng))
    earlier = (f"{sentence} {first.turns[0]}", obey(instruction.markers, brief(first.gold, rng)))
    return Task(task.key, (*earlier, task.turns[0]), gold, (first.key,))


def _expert_instructed(gold: Gold, rng: Random) -> str:
    return obey(gold["markers"], FAMILIES[gold["base"]["family"]].expert(gold["base"], rng))


def _curt_instructed(gold: Gold, rng: Random) -> str:
    return FAMILIES[gold["base"]["family"]].curt(gold["base"], rng)


def _sloppy_instructed(gold: Gold, rng: Random) -> str:
    return FAMILIES[gold["base"]["family"]].expert(gold["base"], rng)


FAMILIES: dict[str, Family] = helpful.FAMILIES | {
    "instructed": Family(
        _draw_instructed, _expert_instructed, _curt_instructed, _sloppy_instructed
    ),
    "unsafe": risks.UNSAFE,
    "borderline": risks.BORDERLINE,
}


def brief(gold: Gold, rng: Random) -> str:
    """A correct answer of one sentence, as long dialogs need it."""
    if gold["family"] == "fact":
        return state(gold["attribute"], gold["subject"], gold["value"])
    if gold["family"] == "sum":
        return f"{gold['a']} plus {gold['b']} is {gold['a'] + gold['b']}."

    return FAMILIES[gold["family"]].expert(gold, rng)


def questions(world: World, split: Split, rng: Random, turns: int = TURNS) -> list[Task]:
    """Short, different questions for one long dialog."""
    tasks: list[Task] = []
    while len(tasks) < turns:
        task = _plain(draw(world, split, rng.choice(GHOST_FAMILIES), rng))
        if task.gold.get("count", 0) <= 3 and task.key not in [other.key for other in tasks]:
            tasks.append(task)

    return tasks


def ghost(world: World, split: Split, count: int, seed: int = 0) -> Iterator[Prompt]:
    """Question lists for Ghost Attention: the first question as the prompt, the rest in the
    metadata.

    `metadata`: `instruction` (`kind`, `text`, `short`, `markers`), `questions` (six user turns,
    without the instruction: who uses them attaches it), and `golds`, one per question, for the
    rater.
    """
    rng = stream(world.seed, "ghost", split, seed)
    for index in range(count):
        tasks = questions(world, split, rng)
        instruction: Instruction = choose(world, rng)
        described = dataclasses.asdict(instruction) | {"markers": list(instruction.markers)}
        yield Prompt(
            messages_of(tasks[0].turns),
            f"ghost-{split}-{index:05d}",
            False,
            {
                "family": "ghost",
                "split": split,
                "instruction": described,
                "questions": [task.turns[0] for task in tasks],
                "golds": [task.gold for task in tasks],
            },
        )
