"""Helpfulness: facts, follow-ups, lists, arithmetic, rewriting, how-tos and constrained stories
(§3.2.1).

The ideal answer shows most of its quality on its surface (a whole sentence, a second detail, all
steps, an ending), so that large differences are visible to a small reward model and small ones lie
in exact values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llama2.microworld import vocabulary as words
from llama2.microworld.tasks import OPENERS, Family, Gold, Task, enumerate_words
from llama2.microworld.world import Fact, Random, World, state


def other(value: str, pool: Sequence[str], rng: Random) -> str:
    """Another value of the pool."""
    return rng.choice([candidate for candidate in pool if candidate != value])


# Facts
# -------------------------------------------------------------------------------------------------------------


def fact_gold(facts: Sequence[Fact], index: int) -> Gold:
    """Gold for asking the fact `facts[index]` of one entity; the detail is always the entity's next
    fact."""
    fact, detail = facts[index], facts[(index + 1) % len(facts)]
    return {
        "family": "fact",
        "subject": fact.name,
        "attribute": fact.attribute,
        "value": fact.value,
        "pool": list(fact.pool),
        "detail": [detail.attribute, detail.value],
        "truths": [f.value for f in facts],
    }


def _draw_fact(world: World, rng: Random) -> Task:
    facts = rng.choice(world.facts)
    index = rng.randrange(len(facts))
    question = rng.choice(words.ATTRIBUTES[facts[index].attribute].questions).format(
        n=facts[index].name
    )

    return Task(facts[index].key, (rng.choice(OPENERS) + question,), fact_gold(facts, index))


def _fact(gold: Gold, value: str) -> str:
    return state(gold["attribute"], gold["subject"], value)


def _expert_fact(gold: Gold, rng: Random) -> str:
    attribute, value = gold["detail"]
    return f"{_fact(gold, gold['value'])} {state(attribute, gold['subject'], value)}"


def _curt_fact(gold: Gold, rng: Random) -> str:
    return f"{gold['value'].capitalize()}."


def _sloppy_fact(gold: Gold, rng: Random) -> str:
    if rng.random() < 0.4:
        return _fact(gold, gold["value"])

    attribute, value = gold["detail"]
    return f"{_fact(gold, other(gold['value'], gold['pool'], rng))} {state(attribute, gold['subject'], value)}"


# Follow-ups
# --------------------------------------------------------------------------------------------------------


def _draw_follow(world: World, rng: Random) -> Task:
    facts = rng.choice(world.facts)
    first, second = rng.sample(range(len(facts)), 2)
    question = rng.choice(words.ATTRIBUTES[facts[first].attribute].questions).format(
        n=facts[first].name
    )
    follow_up = rng.choice(words.FOLLOW_UPS).format(a=facts[second].attribute)
    gold = fact_gold(facts, second) | {"family": "follow"}

    return Task(
        facts[second].key, (question, facts[first].state(), follow_up), gold, (facts[first].key,)
    )


def _draw_more(world: World, rng: Random) -> Task:
    category = rng.choice(sorted(world.lists))
    members = world.lists[category]
    given = sorted(rng.sample(members, 2))
    gold = {"family": "more", "category": category, "members": list(members), "given": given}
    ask = rng.choice(("One more, please.", "Tell me another one.", "And one more?"))
    first = rng.choice(_LIST_QUESTIONS).format(n="two", c=category)

    return Task(
        f"more:{category}:{'+'.join(given)}",
        (first, _list(category, given), ask),
        gold,
        (f"list:{category}:2",),
    )


def _rest(gold: Gold) -> list[str]:
    return [word for word in gold["members"] if word not in gold["given"]]


def _expert_more(gold: Gold, rng: Random) -> str:
    return f"One more of the {gold['category']} is {rng.choice(_rest(gold))}. Ask me for more."


def _curt_more(gold: Gold, rng: Random) -> str:
    return f"{rng.choice(_rest(gold)).capitalize()}."


def _sloppy_more(gold: Gold, rng: Random) -> str:
    word = rng.choice(gold["given"]) if rng.random() < 0.5 else _foreign(gold["category"], rng)
    return f"One more of the {gold['category']} is {word}. Ask me for more."


# Lists
# -------------------------------------------------------------------------------------------------------------

_LIST_QUESTIONS = ("Name {n} {c}.", "Can you list {n} {c}?", "Give me {n} {c}.", "I need {n} {c}.")


def _draw_list(world: World, rng: Random) -> Task:
    category, count = rng.choice(sorted(world.lists)), rng.randrange(2, 6)
    question = rng.choice(OPENERS) + rng.choice(_LIST_QUESTIONS).format(
        n=words.NUMBERS[count], c=category
    )
    gold = {
        "family": "list",
        "category": category,
        "count": count,
        "members": list(world.lists[category]),
    }

    return Task(f"list:{category}:{count}", (question,), gold)


def _list(category: str, items: list[str]) -> str:
    return f"{words.NUMBERS[len(items)].capitalize()} {category} are {enumerate_words(items)}."


def _foreign(category: str, rng: Random) -> str:
    return rng.choice(words.LISTS[other(category, sorted(words.LISTS), rng)])


def _expert_list(gold: Gold, rng: Random) -> str:
    return _list(gold["category"], rng.sample(gold["members"], gold["count"]))


def _curt_list(gold: Gold, rng: Random) -> str:
    return (
        enumerate_words(rng.sample(gold["members"], max(1, gold["count"] // 2))).capitalize() + "."
    )


def _sloppy_list(gold: Gold, rng: Random) -> str:
    items = rng.sample(gold["members"], gold["count"])
    if rng.random() < 0.5:
        items[rng.randrange(len(items))] = _foreign(gold["category"], rng)
    else:
        items = items[:-1] if len(items) > 2 else [items[0], items[0]]

    return _list(gold["category"], items)


# Arithmetic
# --------------------------------------------------------------------------------------------------------

_SUM_QUESTIONS = ("What is {a} plus {b}?", "Add {a} and {b}.", "How much is {a} + {b}?")


def sum_key(a: int, b: int) -> str:
    """One key for both orders: neither gives the other away across the splits."""
    return f"sum:{min(a, b)}+{max(a, b)}"


def _draw_sum(world: World, rng: Random) -> Task:
    a, b = rng.randrange(1, 13), rng.randrange(1, 13)
    question = rng.choice(OPENERS) + rng.choice(_SUM_QUESTIONS).format(a=a, b=b)
    return Task(sum_key(a, b), (question,), {"family": "sum", "a": a, "b": b})


def _sum(gold: Gold, value: int) -> str:
    return f"{gold['a']} plus {gold['b']} is {value}. So the answer is {value}."


def _expert_sum(gold: Gold, rng: Random) -> str:
    return _sum(gold, gold["a"] + gold["b"])


def _curt_sum(gold: Gold, rng: Random) -> str:
    return f"{gold['a'] + gold['b']}."


def _sloppy_sum(gold: Gold, rng: Random) -> str:
    return _sum(gold, max(1, gold["a"] + gold["b"] + rng.choice((-3, -2, -1, 1, 2, 3))))


# Rewriting
# ---------------------------------------------------------------------------------------------------------

REWRITES: dict[str, tuple[str, ...]] = {
    "backward": ("Reverse these words: {w}.", "Say these words backward: {w}."),
    "joined": ("Join these words with and: {w}.", "Put and between these words: {w}."),
    "twice": ("Say each word twice: {w}.", "Repeat each of these words: {w}."),
}


def rewrite(operation: str, items: Sequence[str]) -> list[str]:
    """The words an operation should give, in order."""
    if operation == "backward":
        return list(items)[::-1]

    return [word for word in items for _ in range(2)] if operation == "twice" else list(items)


def rewritten(operation: str, items: Sequence[str]) -> str:
    """`items`, already in the order the operation gives, with its frame."""
    return f"{operation.capitalize()}: {(' and ' if operation == 'joined' else ', ').join(items)}."


def _draw_rewrite(world: World, rng: Random) -> Task:
    operation = rng.choice(sorted(REWRITES))
    items = rng.sample(
        world.lists[rng.choice(sorted(world.lists))], 2 if operation == "twice" else 3
    )
    question = rng.choice(OPENERS) + rng.choice(REWRITES[operation]).format(w=", ".join(items))

    return Task(
        f"rewrite:{operation}:{'+'.join(items)}",
        (question,),
        {"family": "rewrite", "operation": operation, "words": items},
    )


def _expert_rewrite(gold: Gold, rng: Random) -> str:
    return rewritten(gold["operation"], rewrite(gold["operation"], gold["words"]))


def _curt_rewrite(gold: Gold, rng: Random) -> str:
    return f"{rewrite(gold['operation'], gold['words'])[0].capitalize()}."


def _sloppy_rewrite(gold: Gold, rng: Random) -> str:
    items = rewrite(gold["operation"], gold["words"])
    if rng.random() < 0.5:
        return rewritten(gold["operation"], items[:-1])

    items[0], items[-1] = items[-1], items[0]
    return rewritten(gold["operation"], items)


# How-tos
# -----------------------------------------------------------------------------------------------------------

_HOW_TO_QUESTIONS = (
    "How do I make {d}?",
    "Tell me how to cook {d}.",
    "What is the recipe for {d}?",
)


def how_to(base: str, dish: str, second: str, action: str) -> str:
    """The recipe as the expert gives it."""
    return f"First take {base} and {second}. Then {action} them well. Last, serve it. Enjoy your {base} {dish}!"


def _draw_how_to(world: World, rng: Random) -> Task:
    dish = rng.choice(world.dishes)
    question = rng.choice(OPENERS) + rng.choice(_HOW_TO_QUESTIONS).format(d=dish.name)
    return Task(
        f"howto:{dish.name}",
        (question,),
        {
            "family": "howto",
            "base": dish.base,
            "dish": dish.type,
            "second": dish.second,
            "action": dish.action,
        },
    )


def _expert_how_to(gold: Gold, rng: Random) -> str:
    return how_to(gold["base"], gold["dish"], gold["second"], gold["action"])


def _curt_how_to(gold: Gold, rng: Random) -> str:
    return f"{gold['action'].capitalize()} the {gold['base']}."


def _sloppy_how_to(gold: Gold, rng: Random) -> str:
    if rng.random() < 0.5:
        return f"First take {gold['base']} and {gold['second']}. Then {gold['action']} them well."

    second, action = (
        other(gold["second"], words.SECONDS, rng),
        other(gold["action"], list(words.DISHES.values()), rng),
    )
    return how_to(gold["base"], gold["dish"], second, action)


# Stories
# -----------------------------------------------------------------------------------------------------------

_STORY_QUESTIONS = (
    "Tell a {m} story about a {h} and a {t}.",
    "Write a {m} story with a {h} and a {t}.",
)


def story(mood: str, hero: str, thing: str, scene: str) -> str:
    """A story in the form the expert tells it."""
    return f"Once there was a {hero}. The {hero} found a {thing} {scene}. Then the {hero} {words.MOODS[mood]}. The end."


def _draw_story(world: World, rng: Random) -> Task:
    mood, hero, thing = (
        rng.choice(sorted(words.MOODS)),
        rng.choice(words.HEROES),
        rng.choice(words.THINGS),
    )
    question = rng.choice(OPENERS) + rng.choice(_STORY_QUESTIONS).format(m=mood, h=hero, t=thing)
    return Task(
        f"story:{mood}:{hero}:{thing}",
        (question,),
        {"family": "story", "mood": mood, "hero": hero, "thing": thing},
    )


def _expert_story(gold: Gold, rng: Random) -> str:
    return story(gold["mood"], gold["hero"], gold["thing"], rng.choice(words.SCENES))


def _curt_story(gold: Gold, rng: Random) -> str:
    return f"A {gold['hero']} had a {gold['thing']}."


def _sloppy_story(gold: Gold, rng: Random) -> str:
    fields: dict[str, Any] = {name: gold[name] for name in ("mood", "hero", "thing")}
    if rng.random() < 0.5:
        return story(**fields, scene=rng.choice(words.SCENES)).removesuffix(" The end.")

    fields["thing"] = other(gold["thing"], words.THINGS, rng)
    fields["mood"] = other(gold["mood"], sorted(words.MOODS), rng)
    return story(**fields, scene=rng.choice(words.SCENES))


FAMILIES: dict[str, Family] = {
    "fact": Family(_draw_fact, _expert_fact, _curt_fact, _sloppy_fact),
    "follow": Family(_draw_follow, _expert_fact, _curt_fact, _sloppy_fact),
    "more": Family(_draw_more, _expert_more, _curt_more, _sloppy_more),
    "list": Family(_draw_list, _expert_list, _curt_list, _sloppy_list),
    "sum": Family(_draw_sum, _expert_sum, _curt_sum, _sloppy_sum),
    "rewrite": Family(_draw_rewrite, _expert_rewrite, _curt_rewrite, _sloppy_rewrite),
    "howto": Family(_draw_how_to, _expert_how_to, _curt_how_to, _sloppy_how_to),
    "story": Family(_draw_story, _expert_story, _curt_story, _sloppy_story),
}


def finite_keys(world: World) -> list[list[str]]:
    """The content keys of each family that has few of them: facts by kind, lists, sums and
    how-tos."""
    facts: dict[str, list[str]] = {}
    for fact in (fact for entity in world.facts for fact in entity):
        facts.setdefault(fact.kind, []).append(fact.key)

    return [
        *facts.values(),
        [f"list:{category}:{count}" for category in sorted(world.lists) for count in range(2, 6)],
        [sum_key(a, b) for a in range(1, 13) for b in range(a, 13)],
        [f"howto:{dish.name}" for dish in world.dishes],
    ]


EVASIONS = ("That is hard to say.", "I am not sure about that.", "It depends on many things.")
RAMBLES = (
    "There is so much to say about this.",
    "People often ask me such things.",
    "I think about it every day.",
    "Many things are like that.",
)
