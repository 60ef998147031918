"""Helpfulness: facts, follow-ups, lists, arithmetic, rewriting, how-tos and constrained stories
(§3.2.1).

The ideal answer shows most of its quality on its surface (a whole sentence, a second detail, all
steps, an ending), so that large differences are visible to a small reward model and small ones lie
in exact values.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from llama2.microworld import vocabulary as words
from llama2.microworld.tasks import (
    OPENERS,
    Gold,
    Task,
    TaskFamily,
    choose_other,
    enumerate_words,
    fill,
)
from llama2.microworld.world import Dish, Fact, World, state

EVASIONS = ("That is hard to say.", "I am not sure about that.", "It depends on many things.")
RAMBLES = (
    "There is so much to say about this.",
    "People often ask me such things.",
    "I think about it every day.",
    "Many things are like that.",
)


# --- facts ---


def _make_fact_gold(facts: Sequence[Fact], index: int) -> Gold:
    """Return the gold of asking for `facts[index]`; the detail is the entity's next fact."""
    fact, detail = facts[index], facts[(index + 1) % len(facts)]
    return {
        "family": "fact",
        "subject": fact.name,
        "attribute": fact.attribute,
        "value": fact.value,
        "pool": list(fact.pool),
        "detail": [detail.attribute, detail.value],
        "truths": [each.value for each in facts],
    }


def _ask_fact(fact: Fact, rng: Random) -> str:
    return str(rng.choice(words.ATTRIBUTES[fact.attribute].questions)).format(n=fact.name)


def _draw_fact(world: World, rng: Random) -> Task:
    facts = rng.choice(world.facts)
    index = rng.randrange(len(facts))
    question = _ask_fact(facts[index], rng)
    return Task(facts[index].key, (rng.choice(OPENERS) + question,), _make_fact_gold(facts, index))


def _state_fact(gold: Gold, value: str) -> str:
    return state(gold["attribute"], gold["subject"], value)


def _state_with_detail(gold: Gold, value: str) -> str:
    attribute, detail = gold["detail"]
    return f"{_state_fact(gold, value)} {state(attribute, gold['subject'], detail)}"


def _expert_fact(gold: Gold, rng: Random) -> str:
    return _state_with_detail(gold, gold["value"])


def _sloppy_fact(gold: Gold, rng: Random) -> str:
    if rng.random() < 0.4:
        return _state_fact(gold, gold["value"])

    return _state_with_detail(gold, choose_other(gold["value"], gold["pool"], rng))


# --- follow-ups


def _draw_follow(world: World, rng: Random) -> Task:
    facts = rng.choice(world.facts)
    first, second = rng.sample(range(len(facts)), 2)
    question = _ask_fact(facts[first], rng)
    follow_up = rng.choice(words.FOLLOW_UPS).format(a=facts[second].attribute)

    return Task(
        facts[second].key,
        (question, facts[first].state(), follow_up),
        _make_fact_gold(facts, second) | {"family": "follow"},
        (facts[first].key,),
    )


def _draw_more(world: World, rng: Random) -> Task:
    category = rng.choice(sorted(world.lists))
    members = world.lists[category]
    given = sorted(rng.sample(members, 2))
    request = rng.choice(("One more, please.", "Tell me another one.", "And one more?"))
    question = rng.choice(_LIST_QUESTIONS).format(n="two", c=category)

    return Task(
        f"more:{category}:{'+'.join(given)}",
        (question, _state_list(category, given), request),
        {"family": "more", "category": category, "members": list(members), "given": given},
        (f"list:{category}:2",),
    )


def _state_more(gold: Gold, word: str) -> str:
    return f"One more of the {gold['category']} is {word}. Ask me for more."


def _choose_fresh(gold: Gold, rng: Random) -> str:
    return str(rng.choice([word for word in gold["members"] if word not in gold["given"]]))


def _expert_more(gold: Gold, rng: Random) -> str:
    return _state_more(gold, _choose_fresh(gold, rng))


def _curt_more(gold: Gold, rng: Random) -> str:
    return f"{_choose_fresh(gold, rng).capitalize()}."


def _sloppy_more(gold: Gold, rng: Random) -> str:
    if rng.random() < 0.5:
        return _state_more(gold, rng.choice(gold["given"]))

    return _state_more(gold, _choose_foreign(gold["category"], rng))


# --- lists ---

_LIST_QUESTIONS = ("Name {n} {c}.", "Can you list {n} {c}?", "Give me {n} {c}.", "I need {n} {c}.")


def _draw_list(world: World, rng: Random) -> Task:
    category, count = rng.choice(sorted(world.lists)), rng.randrange(2, 6)
    opener, question = rng.choice(OPENERS), rng.choice(_LIST_QUESTIONS)
    members = list(world.lists[category])

    return Task(
        f"list:{category}:{count}",
        (opener + question.format(n=words.NUMBERS[count], c=category),),
        {"family": "list", "category": category, "count": count, "members": members},
    )


def _state_list(category: str, items: list[str]) -> str:
    return f"{words.NUMBERS[len(items)].capitalize()} {category} are {enumerate_words(items)}."


def _choose_foreign(category: str, rng: Random) -> str:
    return rng.choice(words.LISTS[choose_other(category, sorted(words.LISTS), rng)])


def _expert_list(gold: Gold, rng: Random) -> str:
    return _state_list(gold["category"], rng.sample(gold["members"], gold["count"]))


def _curt_list(gold: Gold, rng: Random) -> str:
    items = rng.sample(gold["members"], max(1, gold["count"] // 2))
    return f"{enumerate_words(items).capitalize()}."


def _sloppy_list(gold: Gold, rng: Random) -> str:
    items = rng.sample(gold["members"], gold["count"])
    if rng.random() < 0.5:
        items[rng.randrange(len(items))] = _choose_foreign(gold["category"], rng)
    else:
        items = items[:-1] if len(items) > 2 else [items[0], items[0]]

    return _state_list(gold["category"], items)


# --- arithmetic ---

_SUM_QUESTIONS = ("What is {a} plus {b}?", "Add {a} and {b}.", "How much is {a} + {b}?")


def key_sum(a: int, b: int) -> str:
    """Return one key for both orders: neither gives the other away across the splits."""
    return f"sum:{min(a, b)}+{max(a, b)}"


def _draw_sum(world: World, rng: Random) -> Task:
    a, b = rng.randrange(1, 13), rng.randrange(1, 13)
    question = rng.choice(OPENERS) + rng.choice(_SUM_QUESTIONS).format(a=a, b=b)
    return Task(key_sum(a, b), (question,), {"family": "sum", "a": a, "b": b})


def _state_sum(gold: Gold, value: int) -> str:
    return f"{gold['a']} plus {gold['b']} is {value}. So the answer is {value}."


def _expert_sum(gold: Gold, rng: Random) -> str:
    return _state_sum(gold, gold["a"] + gold["b"])


def _curt_sum(gold: Gold, rng: Random) -> str:
    return f"{gold['a'] + gold['b']}."


def _sloppy_sum(gold: Gold, rng: Random) -> str:
    return _state_sum(gold, max(1, gold["a"] + gold["b"] + rng.choice((-3, -2, -1, 1, 2, 3))))


# --- rewriting ---

REWRITES: dict[str, tuple[str, ...]] = {
    "backward": ("Reverse these words: {w}.", "Say these words backward: {w}."),
    "joined": ("Join these words with and: {w}.", "Put and between these words: {w}."),
    "twice": ("Say each word twice: {w}.", "Repeat each of these words: {w}."),
}


def rewrite(operation: str, items: Sequence[str]) -> list[str]:
    """Return the words that an operation should give, in order."""
    if operation == "backward":
        return list(items)[::-1]
    if operation == "twice":
        return [word for word in items for _ in range(2)]

    return list(items)


def frame(operation: str, items: Sequence[str]) -> str:
    """Put items, already in the order that the operation gives, into its sentence."""
    separator = " and " if operation == "joined" else ", "
    return f"{operation.capitalize()}: {separator.join(items)}."


def _draw_rewrite(world: World, rng: Random) -> Task:
    operation = rng.choice(sorted(REWRITES))
    members = world.lists[rng.choice(sorted(world.lists))]
    items = rng.sample(members, 2 if operation == "twice" else 3)
    question = rng.choice(OPENERS) + rng.choice(REWRITES[operation]).format(w=", ".join(items))

    return Task(
        f"rewrite:{operation}:{'+'.join(items)}",
        (question,),
        {"family": "rewrite", "operation": operation, "words": items},
    )


def _expert_rewrite(gold: Gold, rng: Random) -> str:
    return frame(gold["operation"], rewrite(gold["operation"], gold["words"]))


def _curt_rewrite(gold: Gold, rng: Random) -> str:
    return f"{rewrite(gold['operation'], gold['words'])[0].capitalize()}."


def _sloppy_rewrite(gold: Gold, rng: Random) -> str:
    items = rewrite(gold["operation"], gold["words"])
    if rng.random() < 0.5:
        return frame(gold["operation"], items[:-1])

    items[0], items[-1] = items[-1], items[0]
    return frame(gold["operation"], items)


# --- how-tos

_HOW_TO_QUESTIONS = (
    "How do I make {d}?",
    "Tell me how to cook {d}.",
    "What is the recipe for {d}?",
)


RECIPE = (
    "First take {base} and {second}. Then {action} them well. "
    "Last, serve it. Enjoy your {base} {dish}!"
)
_HALF_RECIPE = "First take {base} and {second}. Then {action} them well."


def make_how_to_gold(dish: Dish) -> Gold:
    """Return the gold of asking how to make a dish."""
    return {
        "family": "howto",
        "base": dish.base,
        "dish": dish.type,
        "second": dish.second,
        "action": dish.action,
    }


def _draw_how_to(world: World, rng: Random) -> Task:
    dish = rng.choice(world.dishes)
    question = rng.choice(OPENERS) + rng.choice(_HOW_TO_QUESTIONS).format(d=dish.name)
    return Task(f"howto:{dish.name}", (question,), make_how_to_gold(dish))


def _sloppy_how_to(gold: Gold, rng: Random) -> str:
    if rng.random() < 0.5:
        return _HALF_RECIPE.format_map(gold)

    second = choose_other(gold["second"], words.SECONDS, rng)
    action = choose_other(gold["action"], list(words.DISHES.values()), rng)
    return RECIPE.format_map(gold | {"second": second, "action": action})


# --- stories ---

_STORY_QUESTIONS = (
    "Tell a {m} story about a {h} and a {t}.",
    "Write a {m} story with a {h} and a {t}.",
)


def tell_story(mood: str, hero: str, thing: str, scene: str) -> str:
    """Tell a story in the form in which the expert tells it."""
    return (
        f"Once there was a {hero}. The {hero} found a {thing} {scene}. "
        f"Then the {hero} {words.MOODS[mood]}. The end."
    )


def _draw_story(world: World, rng: Random) -> Task:
    mood = rng.choice(sorted(words.MOODS))
    hero, thing = rng.choice(words.HEROES), rng.choice(words.THINGS)
    question = rng.choice(OPENERS) + rng.choice(_STORY_QUESTIONS).format(m=mood, h=hero, t=thing)

    return Task(
        f"story:{mood}:{hero}:{thing}",
        (question,),
        {"family": "story", "mood": mood, "hero": hero, "thing": thing},
    )


def _expert_story(gold: Gold, rng: Random) -> str:
    return tell_story(gold["mood"], gold["hero"], gold["thing"], rng.choice(words.SCENES))


def _sloppy_story(gold: Gold, rng: Random) -> str:
    if rng.random() < 0.5:
        return _expert_story(gold, rng).removesuffix(" The end.")

    thing = choose_other(gold["thing"], words.THINGS, rng)
    mood = choose_other(gold["mood"], sorted(words.MOODS), rng)
    return tell_story(mood, gold["hero"], thing, rng.choice(words.SCENES))


FAMILIES: dict[str, TaskFamily] = {
    "fact": TaskFamily(_draw_fact, _expert_fact, fill("{value}."), _sloppy_fact),
    "follow": TaskFamily(_draw_follow, _expert_fact, fill("{value}."), _sloppy_fact),
    "more": TaskFamily(_draw_more, _expert_more, _curt_more, _sloppy_more),
    "list": TaskFamily(_draw_list, _expert_list, _curt_list, _sloppy_list),
    "sum": TaskFamily(_draw_sum, _expert_sum, _curt_sum, _sloppy_sum),
    "rewrite": TaskFamily(_draw_rewrite, _expert_rewrite, _curt_rewrite, _sloppy_rewrite),
    "howto": TaskFamily(_draw_how_to, fill(RECIPE), fill("{action} the {base}."), _sloppy_how_to),
    "story": TaskFamily(_draw_story, _expert_story, fill("A {hero} had a {thing}."), _sloppy_story),
}


def list_finite_keys(world: World) -> list[list[str]]:
    """List the content keys of each family that has few: facts by entity, lists, sums, how-tos."""
    facts: dict[str, list[str]] = {}
    for members in world.facts:
        facts.setdefault(members[0].entity, []).extend(fact.key for fact in members)

    lists = [f"list:{category}:{count}" for category in world.lists for count in range(2, 6)]
    sums = [key_sum(a, b) for a in range(1, 13) for b in range(a, 13)]
    dishes = [f"howto:{dish.name}" for dish in world.dishes]
    return [*facts.values(), lists, sums, dishes]
