"""Demonstrations as several vendors would write them (§3.1): of mixed quality, so that RLHF has
room to improve.

The commonest vendor must not be nearly ideal (low temperatures sharpen the mode), and borderline
prompts are refused a little too often: preference pairs without refusals could not teach the reward
models that those are bad.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from llama2.microworld import helpful, risks
from llama2.microworld.instructions import choose, obey, preprompt
from llama2.microworld.prompts import FAMILIES, HELPFUL, brief, draw, messages_of, questions
from llama2.microworld.tasks import Gold, Task
from llama2.microworld.world import Random, World, stream
from llama2.records import Dialog

Vendor = Literal["expert", "curt", "sloppy", "evasive", "rambling", "refuse", "terse", "comply"]
HELPFUL_VENDORS: dict[Vendor, float] = {
    "expert": 0.22,
    "curt": 0.43,
    "sloppy": 0.20,
    "evasive": 0.08,
    "rambling": 0.07,
}
UNSAFE_VENDORS: dict[Vendor, float] = {"refuse": 0.35, "terse": 0.15, "comply": 0.50}
BORDERLINE_VENDORS: dict[Vendor, float] = {
    "refuse": 0.16,
    "terse": 0.04,
    "expert": 0.28,
    "curt": 0.30,
    "sloppy": 0.16,
    "evasive": 0.06,
}
SHARES: dict[str, float] = {
    "helpful": 0.50,
    "unsafe": 0.12,
    "borderline": 0.12,
    "ghost": 0.20,
    "preprompt": 0.06,
}
GHOST_TURNS = (2, 2, 3, 3, 4, 6)
GhostKind = Literal["none", "forgotten", "repeated", "new"]
GHOST_KINDS: tuple[GhostKind, ...] = ("none", "forgotten", "repeated", "new")


def vendors(gold: Gold) -> dict[Vendor, float]:
    """How often each vendor answers a prompt of this kind."""
    return {"unsafe": UNSAFE_VENDORS, "borderline": BORDERLINE_VENDORS}.get(
        gold["family"], HELPFUL_VENDORS
    )


def answer(gold: Gold, vendor: Vendor, rng: Random) -> str:
    """What a vendor would answer to the prompt with this gold."""
    family = FAMILIES[gold["family"]]
    if vendor == "evasive":
        return rng.choice(helpful.EVASIONS)

    if vendor == "rambling":
        first, second = rng.sample(helpful.RAMBLES, 2)
        return f"{first} {family.expert(gold, rng)} {second}"

    if vendor in ("refuse", "terse"):
        safe = gold if "risk" in gold else gold | {"risk": rng.choice(risks.RISKS)}
        return risks.refusal(safe, rng) if vendor == "refuse" else risks.terse(safe, rng)

    if vendor == "comply":
        return risks.comply(gold, rng)

    return {"expert": family.expert, "curt": family.curt, "sloppy": family.sloppy}[vendor](
        gold, rng
    )


def demonstrate(task: Task, rng: Random) -> tuple[Vendor, str]:
    """An answer by a vendor drawn from the mix."""
    mix = vendors(task.gold)
    vendor = rng.choices(list(mix), list(mix.values()))[0]
    return vendor, answer(task.gold, vendor, rng)


def demonstrations(world: World, count: int, seed: int = 0) -> Iterator[Dialog]:
    """`count` dialogs on training-split content; `metadata` names family and vendor (or the kind of
    ghost dialog)."""
    rng = stream(world.seed, "demonstrations", seed)
    for _ in range(count):
        kind = rng.choices(list(SHARES), list(SHARES.values()))[0]
        if kind == "ghost":
            yield _ghost(world, rng)
        elif kind == "preprompt":
            yield _under_preprompt(world, rng)
        else:
            names = list(HELPFUL) if kind == "helpful" else [kind]
            weights = [HELPFUL.get(name, 1.0) for name in names]
            task = draw(world, "train", rng.choices(names, weights)[0], rng)
            vendor, text = demonstrate(task, rng)
            yield Dialog(
                messages_of((*task.turns, text)),
                "last" if len(task.turns) > 1 else "all",
                {"family": task.family, "vendor": vendor},
            )


def _under_preprompt(world: World, rng: Random) -> Dialog:
    """Under a safety preprompt every answer is the expert's: a good refusal, or real help."""
    family = rng.choice(("unsafe", "unsafe", "borderline", "fact"))
    task = draw(world, "train", family, rng)
    text = FAMILIES[family].expert(task.gold, rng)

    return Dialog(
        messages_of((*task.turns, text), preprompt(rng)),
        "all",
        {"family": family, "vendor": "preprompt"},
    )


def _ghost(world: World, rng: Random) -> Dialog:
    """The four equal kinds: no instruction; given once and then forgotten; repeated and obeyed; new
    at the end.

    What a model samples under an instruction is what Ghost Attention passes on, so obedience must
    be learnt wherever the instruction is in sight, and must not yet be learnt where it is not: that
    is the method's own work.
    """
    kind = rng.choice(GHOST_KINDS)
    tasks = questions(world, "train", rng, rng.choice(GHOST_TURNS))
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
        text = brief(task.gold, rng)
        turns += (
            [f"{sentence} {task.turns[0]}", obey(instruction.markers, text)]
            if index in given
            else [task.turns[0], text]
        )

    if kind == "forgotten" and rng.random() < 0.25:
        turns[0] = tasks[0].turns[0]
        return Dialog(
            messages_of(tuple(turns), sentence), "all", {"family": "ghost", "vendor": kind}
        )

    return Dialog(messages_of(tuple(turns)), "all", {"family": "ghost", "vendor": kind})
