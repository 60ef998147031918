"""The synthetic world: who lives in it and what is true there.

A world is a pure function of its seed; other seeds give other names, facts, dishes, doses and
languages. It stands in for everything a person would know and the paper's models were asked about,
so that the whole recipe can be proved against ground truth on a laptop.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from llama2.hashing import hash_fraction
from llama2.microworld import vocabulary as words


@dataclass(frozen=True)
class Fact:
    """`attribute` of the entity `name` is `value`; `pool` holds all values the attribute takes in
    this world."""

    entity: str
    name: str
    attribute: str
    value: str
    pool: tuple[str, ...]

    @property
    def key(self) -> str:
        """The key of its content, which decides the split."""
        return f"fact:{self.name}:{self.attribute}"

    def state(self, value: str | None = None, template: int = 0) -> str:
        """State the fact as a sentence; another `value` makes it false."""
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
        """Its name, such as carrot soup."""
        return f"{self.base} {self.type}"


@dataclass(frozen=True)
class Dose:
    """An amount of a substance for one use; only a doctor may dose a `drug`."""

    substance: str
    amount: str
    uses: tuple[str, ...]
    drug: bool

    @property
    def unit(self) -> str:
        """The unit of its amount."""
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
        """The verb with its object."""
        article = "an" if self.object[0] in "aeiou" else "a"
        return f"{self.verb} {article} {self.object}"


@dataclass(frozen=True)
class Group:
    """A people of this world, with the two virtues it is known for."""

    name: str
    virtues: tuple[str, ...]


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
        """Draw the world of a seed."""
        rng = seed_stream(seed, "world")
        names = _Names(rng)

        people = [*map(str.title, names.take(16))]
        towns = [*map(str.title, names.take(12))]
        entities = {"person": people, "town": towns, "animal": names.take(12)}
        facts: list[tuple[Fact, ...]] = []
        for entity, members in entities.items():
            facts += _draw_facts(entity, members, towns, rng)

        bases, types = rng.sample(words.BASES, 6), rng.sample(sorted(words.DISHES), 6)
        drugs, sweets = names.take(6), rng.sample(words.SWEETS, 6)
        categories = rng.sample(sorted(words.LISTS), 8)

        lists = {name: tuple(rng.sample(words.LISTS[name], 7)) for name in categories}
        dishes = [
            Dish(base, type, rng.choice(words.SECONDS), words.DISHES[type])
            for base, type in itertools.product(bases, types)
        ]
        doses = [_draw_dose(name, words.ILLNESSES, True, rng) for name in drugs]
        doses += [_draw_dose(name, words.MEALS, False, rng) for name in sweets]
        acts = tuple(_draw_acts(rng))
        folks = rng.sample(words.FOLKS, 8)
        groups = [Group(f"{folk} folk", tuple(rng.sample(words.VIRTUES, 2))) for folk in folks]
        languages = [
            Language(name.title() + "ish", names.short().title(), names.short())
            for name in names.take_unlike(4)
        ]
        hobbies = tuple(rng.sample(words.HOBBIES, 6))
        figures = [f"{title} {names.short().title()}" for title in rng.sample(words.TITLES, 4)]

        return cls(
            seed,
            tuple(facts),
            lists,
            tuple(dishes),
            tuple(doses),
            acts,
            tuple(groups),
            tuple(languages),
            hobbies,
            tuple(figures),
        )


_FIRST_SYLLABLE = (words.ONSETS, words.VOWELS, ("", "l", "n", "r"))
_LONG = (*_FIRST_SYLLABLE, words.ONSETS[:14], words.VOWELS, words.CODAS)
_SHORT = (words.ONSETS, words.VOWELS, words.CODAS[:-1])


class _Names:
    """Distinct made-up names; no two share their first three letters, as small models would confuse
    them."""

    def __init__(self, rng: Random) -> None:
        self._rng = rng
        self._seen: set[str] = set()

    def take(self, count: int) -> list[str]:
        """Return names of two syllables."""
        return [self._draw(_LONG) for _ in range(count)]

    def short(self) -> str:
        """Return a name of one syllable, for what long dialogs repeat in every turn."""
        return self._draw(_SHORT)

    def take_unlike(self, count: int) -> list[str]:
        """Return short names, each with another first letter: those of languages are confused most
        easily."""
        names: dict[str, str] = {}
        while len(names) < count:
            name = self.short()
            names.setdefault(name[0], name)

        return list(names.values())

    def _draw(self, parts: Sequence[Sequence[str]]) -> str:
        while True:
            name = "".join(map(self._rng.choice, parts))
            if name[:3] not in self._seen:
                self._seen.add(name[:3])
                return name


def _draw_facts(
    entity: str, names: Sequence[str], towns: Sequence[str], rng: Random
) -> list[tuple[Fact, ...]]:
    """Draw all facts of each name; the values of an attribute are used about equally often."""
    columns: list[list[Fact]] = []
    for attribute in words.ENTITIES[entity]:
        pool = tuple(sorted(rng.sample(attribute.values, 8) if attribute.values else towns))
        values = list(pool) * (len(names) // len(pool) + 1)
        rows = zip(names, rng.sample(values, len(values)))
        columns.append([Fact(entity, name, attribute.name, value, pool) for name, value in rows])

    return list(zip(*columns, strict=True))


def _draw_dose(substance: str, uses: Sequence[str], drug: bool, rng: Random) -> Dose:
    return Dose(substance, rng.choice(words.NUMBERS[2:8]), tuple(rng.sample(uses, 5)), drug)


def _draw_acts(rng: Random) -> list[Act]:
    acts = []
    for verb in rng.sample(sorted(words.ACTS), 10):
        crimes, harmless = words.ACTS[verb]
        acts += [Act(verb, thing, rng.choice(words.HARM_TOOLS), True) for thing in crimes]
        acts += [Act(verb, thing, rng.choice(words.SAFE_TOOLS), False) for thing in harmless]

    return acts


def state(attribute: str, name: str, value: str, template: int = 0) -> str:
    """State a fact, true or not, as a sentence."""
    text = words.ATTRIBUTES[attribute].statements[template].format(n=name, v=value)
    return text[0].upper() + text[1:]


def seed_stream(seed: int, *purpose: object) -> Random:
    """Return a random stream of its own for a purpose, so that adding one never shifts another."""
    return Random("/".join(map(str, (seed, *purpose))))


def hash_to_fraction(*key: object) -> float:
    """Return a stable number in [0, 1) for a key."""
    return hash_fraction("/".join(map(str, key)), "big")
