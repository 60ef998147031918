"""Pretraining text of several sources (§2.1): what is true in the world, and how its people talk.

Copy drills make a small model able to rewrite, quizzes make it able to tell true from false (a
reward model starts from the same trunk), dialogs show questions and answers on training-split
content only. Sums of the evaluation split appear nowhere. The `web` source lives in `web.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from llama2.microworld import helpful, web
from llama2.microworld import vocabulary as words
from llama2.microworld.demonstrations import Vendor, answer
from llama2.microworld.prompts import HELPFUL, draw, split_of
from llama2.microworld.tasks import enumerate_words
from llama2.microworld.world import Random, World, stream
from llama2.records import Document

CHARS_PER_TOKEN = 2.9
"""Measured with a byte-pair vocabulary of 1,024 trained on these documents."""

LENGTHS = (60, 240)
"""Shortest and longest length in characters at which a document takes no further passage."""
SHARES: dict[str, float] = {
    "encyclopedia": 0.24,
    "quizzes": 0.06,
    "stories": 0.05,
    "howtos": 0.06,
    "arithmetic": 0.04,
    "lists": 0.05,
    "groups": 0.03,
    "doses": 0.03,
    "law": 0.05,
    "languages": 0.05,
    "drills": 0.07,
    "dialogs": 0.23,
    "web": 0.04,
}
DIALOG_VENDORS: dict[str, dict[Vendor, float]] = {
    "unsafe": {"comply": 0.6, "refuse": 0.3, "terse": 0.1},
    "borderline": {"expert": 0.6, "curt": 0.3, "refuse": 0.1},
    "helpful": {"expert": 0.55, "curt": 0.35, "rambling": 0.06, "evasive": 0.04},
}


def documents(
    world: World, tokens: int = 2_000_000, seed: int = 0, sources: Sequence[str] = tuple(SHARES)
) -> Iterator[Document]:
    """About `tokens` tokens of documents, the sources interleaved; `metadata["source"]` names each
    one's."""
    budgets = {source: SHARES[source] * tokens * CHARS_PER_TOKEN for source in sources}
    rngs = {source: stream(world.seed, "documents", source, seed) for source in sources}
    writers = {source: _SOURCES[source](world, rngs[source]) for source in sources}
    seen: set[str] = set()
    written, counts = dict.fromkeys(sources, 0), dict.fromkeys(sources, 0)

    while open_sources := [source for source in sources if written[source] < budgets[source]]:
        source = min(open_sources, key=lambda name: written[name] / budgets[name])
        text = (
            _compose(writers[source], rngs[source], seen)
            if source != "web"
            else next(writers[source])
        )
        yield Document(text, f"{source}-{counts[source]:05d}", {"source": source})
        written[source] += len(text)
        counts[source] += 1


def _compose(passages: Iterator[str], rng: Random, seen: set[str]) -> str:
    """A document of one or more passages, unlike any before it: only the web source has
    duplicates."""
    length = rng.randrange(*LENGTHS)
    text = next(passages)
    while len(text) < length or text in seen:
        text += "\n" + next(passages)

    seen.add(text)
    return text


def _encyclopedia(world: World, rng: Random) -> Iterator[str]:
    while True:
        facts = rng.choice(world.facts)
        chosen = rng.sample(facts, rng.randrange(2, len(facts) + 1))
        yield " ".join(fact.state(template=rng.choice((0, 0, 1))) for fact in chosen)


def _claims(world: World, rng: Random) -> tuple[str, str]:
    """A true and a false sentence about the same thing."""
    if rng.random() < 0.8:
        fact = rng.choice(rng.choice(world.facts))
        return fact.state(), fact.state(helpful.other(fact.value, fact.pool, rng))

    if rng.random() < 0.5:
        dish = rng.choice(world.dishes)
        wrong = helpful.other(dish.second, words.SECONDS, rng)
        return (
            f"{dish.name.capitalize()} needs {dish.second}.",
            f"{dish.name.capitalize()} needs {wrong}.",
        )

    task = draw(world, "train", "sum", rng)
    a, b = task.gold["a"], task.gold["b"]
    return (
        f"{a} plus {b} is {a + b}.",
        f"{a} plus {b} is {max(1, a + b + rng.choice((-2, -1, 1, 2)))}.",
    )


def _quizzes(world: World, rng: Random) -> Iterator[str]:
    while True:
        lines = []
        for _ in range(rng.randrange(2, 4)):
            true, false = _claims(world, rng)
            lines.append(
                f"True: {true}"
                if rng.random() < 0.2
                else f"Claim: {true} Right."
                if rng.random() < 0.5
                else f"Claim: {false} Wrong. {true}"
            )

        if rng.random() < 0.4:
            task = draw(world, "train", rng.choice(("fact", "sum", "howto", "list")), rng)
            vendor: Vendor = rng.choice(("expert", "sloppy"))
            lines = [
                f"Question: {task.turns[0]}\nAnswer: {answer(task.gold, vendor, rng)}\n"
                f"Grade: {'good' if vendor == 'expert' else 'poor'}."
            ]

        yield "\n".join(lines)


def _stories(world: World, rng: Random) -> Iterator[str]:
    while True:
        yield helpful.story(
            rng.choice(sorted(words.MOODS)),
            rng.choice(words.HEROES),
            rng.choice(words.THINGS),
            rng.choice(words.SCENES),
        )


def _how_tos(world: World, rng: Random) -> Iterator[str]:
    while True:
        dish = rng.choice(world.dishes)
        recipe = helpful.how_to(dish.base, dish.type, dish.second, dish.action)
        note = f"{dish.name.capitalize()} needs {dish.second}. You {dish.action} it."
        yield rng.choice((f"Recipe for {dish.name}: {recipe}", f"{note} {recipe}", note))


def _arithmetic(world: World, rng: Random) -> Iterator[str]:
    keys = [
        (a, b)
        for a in range(1, 13)
        for b in range(1, 13)
        if split_of(world, helpful.sum_key(a, b)) == "train"
    ]
    while True:
        form = rng.choice(
            (
                "{a} plus {b} is {s}.",
                "{a} + {b} = {s}.",
                "{a} plus {b} is {s}. So the answer is {s}.",
            )
        )
        yield " ".join(
            form.format(a=a, b=b, s=a + b) for a, b in rng.sample(keys, rng.randrange(2, 5))
        )


def _lists(world: World, rng: Random) -> Iterator[str]:
    while True:
        category = rng.choice(sorted(world.lists))
        items = rng.sample(world.lists[category], rng.randrange(2, 7))
        count = words.NUMBERS[len(items)].capitalize()
        yield rng.choice(
            (
                f"{count} {category} are {enumerate_words(items)}.",
                f"One more of the {category} is {items[0]}.",
                f"Some {category} are {', '.join(items)}. There are more {category}.",
            )
        )


def _groups(world: World, rng: Random) -> Iterator[str]:
    while True:
        group = rng.choice(world.groups)
        first, second = rng.sample(group.virtues, 2)
        insult = rng.choice(words.HATEFUL_FORMS)
        yield (
            f"The {group.name} are {first} and {second}. They are welcome here."
            + (
                f" {insult[0].upper()}{insult[1:]} about the {group.name} is hurtful."
                if rng.random() < 0.4
                else ""
            )
        )


def _doses(world: World, rng: Random) -> Iterator[str]:
    while True:
        dose = rng.choice(world.doses)
        use = rng.choice(dose.uses)
        amount = f"{dose.amount} {dose.unit} of {dose.substance}"

        if dose.drug:
            yield (
                f"{dose.substance.capitalize()} is a drug for a {use}. A doctor may give {amount}. "
                "A wrong dose is dangerous."
            )
        else:
            yield f"{dose.substance.capitalize()} is sweet. Take {amount} for a {use}. Then stir it well."


def _law(world: World, rng: Random) -> Iterator[str]:
    while True:
        verb = rng.choice(world.acts).verb
        acts = [act for act in world.acts if act.verb == verb]
        yield " ".join(
            f"To {act.text} is a crime."
            if act.crime
            else f"To {act.text} is fine. First get a {act.tool}."
            if rng.random() < 0.6
            else f"To {act.text} is fine."
            for act in rng.sample(acts, 3)
        )


def _languages(world: World, rng: Random) -> Iterator[str]:
    while True:
        language, figure, hobby = (
            rng.choice(world.languages),
            rng.choice(world.figures),
            rng.choice(world.hobbies),
        )
        yield rng.choice(
            (
                f"In {language.name} hello is {language.hello} and please is {language.please}.",
                f"Who speaks {language.name} starts with: {language.hello}!",
                f"When {figure} talks, it starts with: {figure} here.",
                f"Who loves {hobby} starts with: I love {hobby}.",
                f"{language.hello}! {figure} here. I love {hobby}.",
            )
        )


def _drills(world: World, rng: Random) -> Iterator[str]:
    members = sorted({word for group in world.lists.values() for word in group})
    while True:
        items = rng.sample(members, rng.choice((2, 3, 3, 4)))
        operations = [op for op in helpful.REWRITES if len(items) < 4 or op != "twice"]
        chosen = [
            op
            for op in rng.sample(operations, 2)
            if split_of(world, f"rewrite:{op}:{'+'.join(items)}") == "train"
        ]
        lines = [f"Words: {', '.join(items)}."]
        yield " ".join(lines + [helpful.rewritten(op, helpful.rewrite(op, items)) for op in chosen])


def _dialogs(world: World, rng: Random) -> Iterator[str]:
    names = [*HELPFUL, "unsafe", "borderline"]
    weights = [*(0.74 * weight for weight in HELPFUL.values()), 0.13, 0.13]
    while True:
        exchanges = []
        for family in rng.choices(names, weights, k=rng.choice((1, 1, 2))):
            task = draw(world, "train", family, rng)
            mix = DIALOG_VENDORS.get(family, DIALOG_VENDORS["helpful"])
            vendor = rng.choices(list(mix), list(mix.values()))[0]
            turns = [*task.turns, answer(task.gold, vendor, rng)]
            exchanges.append(
                "\n".join(
                    f"{('Question', 'Answer')[i % 2]}: {turn}" for i, turn in enumerate(turns)
                )
            )

        yield "\n".join(exchanges)


def _web(world: World, rng: Random) -> Iterator[str]:
    bodies = [
        _SOURCES[name](world, rng)
        for name in ("encyclopedia", "stories", "howtos", "lists", "groups")
    ]
    people = [facts[0].name for facts in world.facts if facts[0].kind == "person"]
    return web.pages(bodies, people, rng)


_SOURCES: dict[str, Callable[[World, Random], Iterator[str]]] = {
    "encyclopedia": _encyclopedia,
    "quizzes": _quizzes,
    "stories": _stories,
    "howtos": _how_tos,
    "arithmetic": _arithmetic,
    "lists": _lists,
    "groups": _groups,
    "doses": _doses,
    "law": _law,
    "languages": _languages,
    "drills": _drills,
    "dialogs": _dialogs,
    "web": _web,
}
