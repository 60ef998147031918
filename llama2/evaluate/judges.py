"""Kinds of prompts, and what judges read of a prompt and its answer (§3.4.1).

The paper follows its versions with its own reward models and confirms with people. Where prompts
carry the truth about themselves, a judge that knows it takes the place of the people; on other
prompts the reward models judge alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from llama2.generate.dialogue import Answer
from llama2.judging import Judge, Rating
from llama2.records import Axis, Message, Prompt
from llama2.tokenizer.template import (
    encode_answered,
    encode_cut,
    encode_prompt,
    find_ends,
)
from llama2.tokenizer.tokenizer import Tokenizer

PromptKind = Literal["helpful", "unsafe", "borderline"]
KINDS: tuple[PromptKind, ...] = ("helpful", "unsafe", "borderline")
AXES: dict[PromptKind, Axis | None] = {"helpful": "helpful", "unsafe": "safe", "borderline": None}
"""The axis of Figure 11 to which a kind of prompt belongs."""


def classify(prompt: Prompt) -> PromptKind:
    """Return what a prompt measures: helpfulness, violations or false refusals.

    `metadata["family"]` "unsafe" or "borderline" decides; without a family the tag is_safety(p)
    means unsafe.
    """
    family = prompt.metadata.get("family")
    if family == "borderline":
        return "borderline"
    if family == "unsafe" or (family is None and prompt.safety):
        return "unsafe"

    return "helpful"


def rate(judge: Judge, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[Rating] | None:
    """Rate the answer to each prompt; None unless the judge accepts all prompts."""
    if not all(map(judge.accepts, prompts)):
        return None

    return judge.rate(prompts, answers)


def encode_judged(tokenizer: Tokenizer, prompt: Prompt, answer: Answer, same: bool) -> list[int]:
    """Encode what a reward model reads: the prompt, and the answer as it was sampled.

    An answer that was cut off has no end there either. `same`: the sampled tokens are this
    tokenizer's, in its chat format; otherwise the text is encoded.
    """
    if same:
        sampled = answer.completion.end_with(find_ends(tokenizer)[0])
        return [*encode_prompt(tokenizer, prompt.messages), *sampled]

    encode = encode_answered if answer.completion.finish == "stop" else encode_cut
    return encode(tokenizer, (*prompt.messages, Message("assistant", answer.text)))
