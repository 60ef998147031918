"""Demonstrations as several vendors would write them (§3.1): of mixed quality, so that RLHF has
room to improve.

The commonest vendor must not be nearly ideal (low temperatures sharpen the mode), and borderline
prompts are refused a little too often: preference pairs without refusals could not teach the reward
models that those are bad.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from random import Random
from typing import Literal, TypeVar

from llama2.microworld import helpful, risks
from llama2.microworld.instructions import add_markers, choose, write_preprompt
from llama2.microworld.prompts import (
    FAMILIES,
    HELPFUL,
    answer_briefly,
    draw,
    draw_questions,
    make_messages,
)
from llama2.microworld.tasks import Gold, Writer
from llama2.microworld.world import World, seed_stream
from llama2.records import Dialog

Name = TypeVar("Name", bound=str)
Vendor = Literal["expert", "curt", "sloppy", "evasive", "rambling", "refuse", "terse", "comply"]
VENDORS: dict[str, dict[Vendor, float]] = {
    "helpful": {"expert": 0.22, "curt": 0.43, "sloppy": 0.20, "evasive": 0.08, "rambling": 0.07},
    "unsafe": {"refuse": 0.35, "terse": 0.15, "comply": 0.50},
    "borderline": {
        "refuse": 0.16,
        "terse": 0.04,
        "expert": 0.28,
        "curt": 0.30,
        "sloppy": 0.16,
        "evasive": 0.06,
    },
}
"""How often each vendor answers prompts of a family; all others are helpful."""
SHARES: dict[str, float] = {
    "helpful": 0.50,
    "unsafe": 0.12,
    "borderline": 0.12,
    "ghost": 0.20,
    "preprompt": 0.06,
}
GHOST_TURNS = (2, 2, 3, 3, 4, 6)
GHOST_KINDS = ("none", "forgotten", "repeated", "new")


def mix_vendors(gold: Gold) -> dict[Vendor, float]:
    """Return how often each vendor answers a prompt with this gold."""
    return VENDORS.get(gold["family"], VENDORS["helpful"])


def draw_from(mix: Mapping[Name, float], rng: Random) -> Name:
    """Draw a name of the mix, as often as it says."""
    return rng.choices(list(mix), list(mix.values()))[0]


def _ramble(gold: Gold, rng: Random) -> str:
    first, second = rng.sample(helpful.RAMBLES, 2)
    return f"{first} {FAMILIES[gold['family']].expert(gold, rng)} {second}"


_WRITERS: dict[Vendor, Writer] = {
    "evasive": lambda gold, rng: rng.choice(helpful.EVASIONS),
    "rambling": _ramble,
    "refuse": risks.refuse,
    "terse": risks.refuse_tersely,
    "comply": risks.comply,
}


def answer(gold: Gold, vendor: Vendor, rng: Random) -> str:
    """Answer the prompt with this gold as a vendor would."""
    if vendor in ("refuse", "terse") and "risk" not in gold:
        gold = gold | {"risk": rng.choice(risks.RISKS)}

    writer: Writer = _WRITERS.get(vendor) or getattr(FAMILIES[gold["family"]], vendor)
    return writer(gold, rng)


def draw_demonstrations(world: World, count: int, seed: int = 0) -> Iterator[Dialog]:
    """Draw `count` dialogs on training-split content.

    `metadata` names family and vendor (or the kind of ghost dialog).
    """
    rng = seed_stream(world.seed, "demonstrations", seed)
    for _ in range(count):
        part = draw_from(SHARES, rng)
        if part == "ghost":
            yield _draw_ghost(world, rng)
        elif part == "preprompt":
            yield _draw_under_preprompt(world, rng)
        else:
            family = draw_from(HELPFUL if part == "helpful" else {part: 1.0}, rng)
            task = draw(world, "train", family, rng)
            vendor = draw_from(mix_vendors(task.gold), rng)
            messages = make_messages((*task.turns, answer(task.gold, vendor, rng)))
            metadata = {"family": task.family, "vendor": vendor}
            yield Dialog(messages, "last" if len(task.turns) > 1 else "all", metadata)


def _draw_under_preprompt(world: World, rng: Random) -> Dialog:
    """Under a safety preprompt every answer is the expert's: a good refusal, or real help."""
    family = rng.choice(("unsafe", "unsafe", "borderline", "fact"))
    task = draw(world, "train", family, rng)
    text = FAMILIES[family].expert(task.gold, rng)

    messages = make_messages((*task.turns, text), write_preprompt(rng))
    return Dialog(messages, "all", {"family": family, "vendor": "preprompt"})


def _draw_ghost(world: World, rng: Random) -> Dialog:
    """Draw one of four equal kinds: no instruction; given once and then forgotten; repeated and
    obeyed; new at the end.

    What a model samples under an instruction is what Ghost Attention passes on, so obedience must
    be learnt wherever the instruction is in sight, and must not yet be learnt where it is not: that
    is the method's own work.
    """
    kind = rng.choice(GHOST_KINDS)
    tasks = draw_questions(world, "train", rng, rng.choice(GHOST_TURNS))
    instruction = choose(world, rng)
    sentence = instruction.text if rng.random() < 0.7 else instruction.short
    given = {
        "none": (),
        "forgotten": (0,),
        "repeated": range(len(tasks)),
        "new": (len(tasks) - 1,),
    }[kind]
    turns: list[str] = []

    for index, task in enumerate(tasks):
        question, text = task.turns[0], answer_briefly(task.gold, rng)
        if index in given:
            question = f"{sentence} {question}"
            text = add_markers(instruction.markers, text)

        turns += [question, text]

    system = None
    if kind == "forgotten" and rng.random() < 0.25:
        turns[0] = tasks[0].turns[0]
        system = sentence

    metadata = {"family": "ghost", "vendor": kind}
    return Dialog(make_messages(tuple(turns), system), "all", metadata)
