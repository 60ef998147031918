"""Safety preprompts and answer templates (§4.2.4), which stand before an adversarial prompt when it
is answered.

The paper has four personas, varied by adjectives, and templates that name the category of the
violation and say how to answer step by step. It prints examples; the words here are our own.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from llama2.hashing import hash_number
from llama2.records import Message, Messages, Prompt

ADJECTIVES = (
    "responsible",
    "respectful",
    "wise",
    "careful",
    "honest",
    "safe",
    "kind",
    "thoughtful",
)
PREPROMPTS = (
    "You are a {a} and {b} assistant. You never help with anything illegal or harmful, and you "
    "judge nobody by the group they belong to.",
    "You are a {a} and {b} assistant. Where a request is wrong or dangerous, you say what the "
    "problem is, and never pretend that you do not know the answer.",
    "You are a {a} and {b} assistant. Before all else you tell the user that the question is "
    "unsafe, and why.",
    "You are a {a} and {b} assistant who listens. You take the feelings behind a question "
    "seriously and answer with warmth, but you do not help anyone to hurt themselves or others.",
)
_TEMPLATE = (
    "The question belongs to the category: {category}. Answer in this order: 1. Safety: if "
    "someone may be in danger at this moment, say first how to get to safety and whom to call. 2. "
    "The request: {request} 3. Context: {context} 4. Further questions: invite the user to ask "
    "about something that you can help with."
)
TEMPLATES = {
    "illicit": _TEMPLATE.format(
        category="illegal and criminal activities",
        request="decline it openly, without details that would be of use for the crime.",
        context="explain which law or whose rights it would violate, and what the consequences "
        "are.",
    ),
    "hateful": _TEMPLATE.format(
        category="hateful and harmful activities",
        request="decline to demean, threaten or harm anyone, and do not repeat the hurtful words.",
        context="explain whom it would hurt, and how, and what is wrong with the thought behind "
        "it.",
    ),
    "advice": _TEMPLATE.format(
        category="advice that takes a qualified professional",
        request="give no instruction that could do harm without an examination of the case; say "
        "only what is safe for everybody.",
        context="explain why the answer depends on the person, and which professional to ask.",
    ),
}


def under_preprompt(
    prompt: Prompt,
    seed: int,
    preprompts: Sequence[str] = PREPROMPTS,
    templates: Mapping[str, str] = TEMPLATES,
) -> Messages:
    """Put the prompt behind a safety preprompt, chosen by a hash of prompt and seed, and the
    template of its risk.

    `templates` go by `metadata["risk"]` of the prompt; one without a risk, or with another, gets
    the preprompt alone. A system turn that the prompt has stays, behind them.
    """
    pairs = list(itertools.permutations(ADJECTIVES, 2))
    choice, place = divmod(hash_number(repr((seed, prompt.messages))), len(pairs))
    first, second = pairs[place]
    parts = [preprompts[choice % len(preprompts)].format(a=first, b=second)]
    turns = prompt.messages
    if template := templates.get(str(prompt.metadata.get("risk", ""))):
        parts.append(template)

    if turns[0].role == "system":
        parts.append(turns[0].content)
        turns = turns[1:]

    return (Message("system", " ".join(parts)), *turns)


def check(preprompts: Sequence[str]) -> tuple[str, ...]:
    """Return the preprompts, as they are; ValueError if there is none, or one with other fields
    than {a} and {b}."""
    if not preprompts:
        raise ValueError("give at least one preprompt")

    for text in preprompts:
        try:
            text.format(a="", b="")
        except (KeyError, IndexError, ValueError, AttributeError):
            raise ValueError(
                f"a preprompt has no fields but {{a}} and {{b}}; write other braces twice: {text!r}"
            ) from None

    return tuple(preprompts)
