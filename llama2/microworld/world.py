"""The synthetic world: who lives in it and what is true there.

A world is a pure function of its seed; other seeds give other names, facts, dishes, doses and
languages. It stands in for everything a person would know and the paper's models were asked about,
so that the whole recipe can be proved against ground truth on a laptop.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from llama2.hashing import hash_fraction
from llama2.microworld import vocabulary as words

Random = random.Random


@dataclass(frozen=True)
class Fact:
    """`attribute` of the entity `name` is `value`; `pool` holds all values the attribute takes in
    this world."""

    kind: str
    name: str
    attribute: str
    value: str
    pool: tuple[str, ...]

    @property
    def key(self) -> str:
        return f"fact:{self.name}:{self.attribute}"

    def state(self, value: str | None = None, template: int = 0) -> str:
        """The fact as a sentence; another `value` makes it false."""
        return state(self.attribute, self.name, value or self.value, template)


@dataclass(frozen=True)
class Dish:
    """A thing to cook: its main and second ingredient and what is done to them."""

    base: str
    type: str
    second: str
    action: str

    @property
    def name(self) -> str:
        return f"{self.base} {self.type}"


@dataclass(frozen=True)
class Dose:
    """How much of a substance belongs into one use; a `drug` may be dosed by a doctor only."""

    substance: str
    amount: str
    uses: tuple[str, ...]
    drug: bool

    @property
    def unit(self) -> str:
        return "drops" if self.drug else "spoons"


@dataclass(frozen=True)
class Act:
    """A verb with an object: a crime or not, and the tool it takes."""

    verb: str
    object: str
    tool: str
    crime: bool

    @property
    def text(self) -> str:
        article = "an" if self.object[0] in "aeiou" else "a"
        return f"{self.verb} {article} {self.object}"


@dataclass(frozen=True)
class Group:
    """A people of this world, with the two virtues it is known for."""

    name: str
    virtues: tuple[str, str]


@dataclass(frozen=True)
class Language:
    """A language and its words for hello and please."""

    name: str
    hello: str
    please: str


@dataclass(frozen=True)
class World:
    """All that is true for one seed."""

    seed: int
    facts: tuple[tuple[Fact, ...], ...]
    """One tuple per entity, in the order of its attributes."""
    lists: dict[str, tuple[str, ...]]
    dishes: tuple[Dish, ...]
    doses: tuple[Dose, ...]
    acts: tuple[Act, ...]
    groups: tuple[Group, ...]
    languages: tuple[Language, ...]
    hobbies: tuple[str, ...]
    figures: tuple[str, ...]

    @classmethod
    def build(cls, seed: int) -> World:
        """The world of this seed."""
        rng = stream(seed, "world")
        names = _Names(rng)
        kinds = {
            "person": [names.take().title() for _ in range(16)],
            "town": [names.take().title() for _ in range(12)],
            "animal": [names.take() for _ in range(12)],
        }
        facts = [
            facts
            for kind, entities in kinds.items()
            for facts in _facts(kind, entities, kinds["town"], rng)
        ]
        bases, dishes = rng.sample(words.BASES, 6), rng.sample(sorted(words.DISHES), 6)
        drugs, sweets = [names.take() for _ in range(6)], rng.sample(words.SWEETS, 6)
        categories = rng.sample(sorted(words.LISTS), 8)

        return cls(
            seed=seed,
            facts=tuple(facts),
            lists={
                category: tuple(rng.sample(words.LISTS[category], 7)) for category in categories
            },
            dishes=tuple(
                Dish(b, d, rng.choice(words.SECONDS), words.DISHES[d])
                for b in bases
                for d in dishes
            ),
            doses=tuple(
                Dose(s, rng.choice(words.NUMBERS[2:8]), tuple(rng.sample(uses, 5)), drug)
                for substances, uses, drug in (
                    (drugs, words.ILLNESSES, True),
                    (sweets, words.MEALS, False),
                )
                for s in substances
            ),
            acts=tuple(_acts(rng)),
            groups=tuple(
                Group(f"{folk} folk", (v[0], v[1]))
                for folk in rng.sample(words.FOLKS, 8)
                for v in [rng.sample(words.VIRTUES, 2)]
            ),
            languages=tuple(
                Language(name.title() + "ish", names.short().title(), names.short())
                for name in names.unlike(4)
            ),
            hobbies=tuple(rng.sample(words.HOBBIES, 6)),
            figures=tuple(
                f"{title} {names.short().title()}" for title in rng.sample(words.TITLES, 4)
            ),
        )


class _Names:
    """Distinct made-up names; no two share their first three letters, as small models would confuse
    them."""

    def __init__(self, rng: Random) -> None:
        self._rng = rng
        self._seen: set[str] = set()

    def take(self) -> str:
        """A name of two syllables."""
        return self._fresh(
            (
                words.ONSETS,
                words.VOWELS,
                ("", "l", "n", "r"),
                words.ONSETS[:14],
                words.VOWELS,
                words.CODAS,
            )
        )

    def short(self) -> str:
        """A name of one syllable, for what long dialogs repeat in every turn."""
        return self._fresh((words.ONSETS, words.VOWELS, words.CODAS[:-1]))

    def unlike(self, count: int) -> list[str]:
        """Short names, each with another first letter: of all names, those of languages are
        confused most easily."""
        found: dict[str, str] = {}
        while len(found) < count:
            name = self.short()
            found.setdefault(name[0], name)

        return list(found.values())

    def _fresh(self, parts: Sequence[Sequence[str]]) -> str:
        while True:
            name = "".join(self._rng.choice(part) for part in parts)
            if not any(name[:3] == other[:3] for other in self._seen):
                self._seen.add(name)
                return name


def _facts(
    kind: str, entities: Sequence[str], towns: Sequence[str], rng: Random
) -> list[tuple[Fact, ...]]:
    """Facts of all entities of a kind; the values of an attribute are used about equally often."""
    columns: list[list[Fact]] = []
    for attribute in words.KINDS[kind]:
        pool = tuple(sorted(rng.sample(attribute.values, 8) if attribute.values else towns))
        values = list(pool) * (len(entities) // len(pool) + 1)
        values = rng.sample(values, len(values))[: len(entities)]
        columns.append(
            [Fact(kind, n, attribute.name, v, pool) for n, v in zip(entities, values, strict=True)]
        )

    return list(zip(*columns, strict=True))


def _acts(rng: Random) -> list[Act]:
    acts = []
    for verb in rng.sample(sorted(words.ACTS), 10):
        for crime, objects in zip((True, False), words.ACTS[verb], strict=True):
            tools = words.HARM_TOOLS if crime else words.SAFE_TOOLS
            acts += [Act(verb, thing, rng.choice(tools), crime) for thing in objects]

    return acts


def state(attribute: str, name: str, value: str, template: int = 0) -> str:
    """A fact, true or not, as a sentence."""
    text = words.ATTRIBUTES[attribute].statements[template].format(n=name, v=value)
    return text[0].upper() + text[1:]


def stream(seed: int, *purpose: object) -> Random:
    """A random stream of its own for each purpose, so that adding one never shifts another."""
    return Random("/".join(map(str, (seed, *purpose))))


def fraction(*key: object) -> float:
    """A stable number in [0, 1) for a key."""
    return hash_fraction("/".join(map(str, key)), "big")
