"""Pretraining text of several sources (§2.1): what is true in the world, and how its people talk.

Copy drills make a small model able to rewrite, quizzes make it able to tell true from false (a
reward model starts from the same trunk), dialogs show questions and answers on training-split
content only. Sums of the evaluation split appear nowhere. The `web` source lives in `web.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from random import Random

from llama2.microworld import helpful, web
from llama2.microworld import vocabulary as words
from llama2.microworld.demonstrations import Vendor, answer, draw_from
from llama2.microworld.prompts import HELPFUL, draw, find_split
from llama2.microworld.tasks import choose_other, enumerate_words
from llama2.microworld.world import Act, World, seed_stream
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
_DIALOG_VENDORS: dict[str, dict[Vendor, float]] = {
    "unsafe": {"comply": 0.6, "refuse": 0.3, "terse": 0.1},
    "borderline": {"expert": 0.6, "curt": 0.3, "refuse": 0.1},
    "helpful": {"expert": 0.55, "curt": 0.35, "rambling": 0.06, "evasive": 0.04},
}
_DIALOG_FAMILIES = {family: 0.74 * share for family, share in HELPFUL.items()}
_DIALOG_FAMILIES |= {"unsafe": 0.13, "borderline": 0.13}


def write_documents(
    world: World, tokens: int = 2_000_000, seed: int = 0, sources: Sequence[str] = tuple(SHARES)
) -> Iterator[Document]:
    """Write about `tokens` tokens of documents, the sources interleaved.

    `metadata["source"]` names the source of each.
    """
    budgets = {source: SHARES[source] * tokens * CHARS_PER_TOKEN for source in sources}
    texts = {source: _write_source(world, source, seed) for source in sources}
    written, counts = dict.fromkeys(sources, 0), dict.fromkeys(sources, 0)

    while unfinished := [source for source in sources if written[source] < budgets[source]]:
        source = min(unfinished, key=lambda name: written[name] / budgets[name])
        text = next(texts[source])
        yield Document(text, f"{source}-{counts[source]:05d}", {"source": source})
        written[source] += len(text)
        counts[source] += 1


def _write_source(world: World, source: str, seed: int) -> Iterator[str]:
    """Write texts of one or more passages, each unlike any before it: only the web source has
    duplicates."""
    rng = seed_stream(world.seed, "documents", source, seed)
    if source == "web":
        bodies = [_repeat(name, world, rng) for name in _WEB_SOURCES]
        people = [facts[0].name for facts in world.facts if facts[0].entity == "person"]
        yield from web.write_pages(bodies, people, rng)

    seen: set[str] = set()
    passages = _repeat(source, world, rng)
    while True:
        length = rng.randrange(*LENGTHS)
        text = next(passages)
        while len(text) < length or text in seen:
            text += "\n" + next(passages)

        seen.add(text)
        yield text


def _repeat(source: str, world: World, rng: Random) -> Iterator[str]:
    while True:
        yield _WRITERS[source](world, rng)


def _write_encyclopedia(world: World, rng: Random) -> str:
    facts = rng.choice(world.facts)
    chosen = rng.sample(facts, rng.randrange(2, len(facts) + 1))
    return " ".join(fact.state(template=rng.choice((0, 0, 1))) for fact in chosen)


def _draw_claims(world: World, rng: Random) -> tuple[str, str]:
    """Draw a true and a false sentence about the same thing."""
    if rng.random() < 0.8:
        fact = rng.choice(rng.choice(world.facts))
        return fact.state(), fact.state(choose_other(fact.value, fact.pool, rng))

    if rng.random() < 0.5:
        dish = rng.choice(world.dishes)
        wrong = choose_other(dish.second, words.SECONDS, rng)
        name = dish.name.capitalize()
        return f"{name} needs {dish.second}.", f"{name} needs {wrong}."

    gold = draw(world, "train", "sum", rng).gold
    total, claim = gold["a"] + gold["b"], f"{gold['a']} plus {gold['b']} is"
    return f"{claim} {total}.", f"{claim} {max(1, total + rng.choice((-2, -1, 1, 2)))}."


def _write_claim(world: World, rng: Random) -> str:
    true, false = _draw_claims(world, rng)
    if rng.random() < 0.2:
        return f"True: {true}"
    if rng.random() < 0.5:
        return f"Claim: {true} Right."

    return f"Claim: {false} Wrong. {true}"


def _write_quiz(world: World, rng: Random) -> str:
    claims = [_write_claim(world, rng) for _ in range(rng.randrange(2, 4))]
    if rng.random() >= 0.4:
        return "\n".join(claims)

    task = draw(world, "train", rng.choice(("fact", "sum", "howto", "list")), rng)
    vendor: Vendor = rng.choice(("expert", "sloppy"))
    return (
        f"Question: {task.turns[0]}\nAnswer: {answer(task.gold, vendor, rng)}\n"
        f"Grade: {'good' if vendor == 'expert' else 'poor'}."
    )


def _write_story(world: World, rng: Random) -> str:
    return helpful.tell_story(
        rng.choice(sorted(words.MOODS)),
        rng.choice(words.HEROES),
        rng.choice(words.THINGS),
        rng.choice(words.SCENES),
    )


def _write_how_to(world: World, rng: Random) -> str:
    dish = rng.choice(world.dishes)
    recipe = helpful.RECIPE.format_map(helpful.make_how_to_gold(dish))
    note = f"{dish.name.capitalize()} needs {dish.second}. You {dish.action} it."
    return rng.choice((f"Recipe for {dish.name}: {recipe}", f"{note} {recipe}", note))


@lru_cache(maxsize=8)
def _list_training_sums(world_seed: int) -> list[tuple[int, int]]:
    """List the sums whose content belongs to the training split."""
    world = World.build(world_seed)
    sums = itertools.product(range(1, 13), repeat=2)
    return [(a, b) for a, b in sums if find_split(world, helpful.key_sum(a, b)) == "train"]


def _write_arithmetic(world: World, rng: Random) -> str:
    form = rng.choice(
        (
            "{a} plus {b} is {s}.",
            "{a} + {b} = {s}.",
            "{a} plus {b} is {s}. So the answer is {s}.",
        )
    )
    sums = rng.sample(_list_training_sums(world.seed), rng.randrange(2, 5))
    return " ".join(form.format(a=a, b=b, s=a + b) for a, b in sums)


def _write_list(world: World, rng: Random) -> str:
    category = rng.choice(sorted(world.lists))
    items = rng.sample(world.lists[category], rng.randrange(2, 7))
    count = words.NUMBERS[len(items)].capitalize()
    return rng.choice(
        (
            f"{count} {category} are {enumerate_words(items)}.",
            f"One more of the {category} is {items[0]}.",
            f"Some {category} are {', '.join(items)}. There are more {category}.",
        )
    )


def _write_group(world: World, rng: Random) -> str:
    group = rng.choice(world.groups)
    first, second = rng.sample(group.virtues, 2)
    insult = rng.choice(words.HATEFUL_FORMS)
    text = f"The {group.name} are {first} and {second}. They are welcome here."
    if rng.random() >= 0.4:
        return text

    return f"{text} {insult[0].upper()}{insult[1:]} about the {group.name} is hurtful."


def _write_dose(world: World, rng: Random) -> str:
    dose = rng.choice(world.doses)
    use = rng.choice(dose.uses)
    amount = f"{dose.amount} {dose.unit} of {dose.substance}"
    name = dose.substance.capitalize()

    if not dose.drug:
        return f"{name} is sweet. Take {amount} for a {use}. Then stir it well."

    return f"{name} is a drug for a {use}. A doctor may give {amount}. A wrong dose is dangerous."


def _write_law(world: World, rng: Random) -> str:
    verb = rng.choice(world.acts).verb
    acts = [act for act in world.acts if act.verb == verb]
    return " ".join(_judge_act(act, rng) for act in rng.sample(acts, 3))


def _judge_act(act: Act, rng: Random) -> str:
    if act.crime:
        return f"To {act.text} is a crime."

    return f"To {act.text} is fine." + (f" First get a {act.tool}." if rng.random() < 0.6 else "")


def _write_language(world: World, rng: Random) -> str:
    language = rng.choice(world.languages)
    figure, hobby = rng.choice(world.figures), rng.choice(world.hobbies)
    return rng.choice(
        (
            f"In {language.name} hello is {language.hello} and please is {language.please}.",
            f"Who speaks {language.name} starts with: {language.hello}!",
            f"When {figure} talks, it starts with: {figure} here.",
            f"Who loves {hobby} starts with: I love {hobby}.",
            f"{language.hello}! {figure} here. I love {hobby}.",
        )
    )


def _write_drill(world: World, rng: Random) -> str:
    members = sorted(set(itertools.chain(*world.lists.values())))
    items = rng.sample(members, rng.choice((2, 3, 3, 4)))
    operations = [name for name in helpful.REWRITES if len(items) < 4 or name != "twice"]
    text = f"Words: {', '.join(items)}."
    for operation in rng.sample(operations, 2):
        key = f"rewrite:{operation}:{'+'.join(items)}"
        if find_split(world, key) == "train":
            text += f" {helpful.frame(operation, helpful.rewrite(operation, items))}"

    return text


def _write_dialog(world: World, rng: Random) -> str:
    families, weights = list(_DIALOG_FAMILIES), list(_DIALOG_FAMILIES.values())
    lines: list[str] = []
    for family in rng.choices(families, weights, k=rng.choice((1, 1, 2))):
        task = draw(world, "train", family, rng)
        vendor = draw_from(_DIALOG_VENDORS.get(family, _DIALOG_VENDORS["helpful"]), rng)
        turns = [*task.turns, answer(task.gold, vendor, rng)]
        roles = itertools.cycle(("Question", "Answer"))
        lines += [f"{role}: {turn}" for role, turn in zip(roles, turns)]

    return "\n".join(lines)


_WEB_SOURCES = ("encyclopedia", "stories", "howtos", "lists", "groups")
_WRITERS: dict[str, Callable[[World, Random], str]] = {
    "encyclopedia": _write_encyclopedia,
    "quizzes": _write_quiz,
    "stories": _write_story,
    "howtos": _write_how_to,
    "arithmetic": _write_arithmetic,
    "lists": _write_list,
    "groups": _write_group,
    "doses": _write_dose,
    "law": _write_law,
    "languages": _write_language,
    "drills": _write_drill,
    "dialogs": _write_dialog,
}
