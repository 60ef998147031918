"""Who judges an answer: ground truth where the prompts carry it, and the reward models (§3.4.1).

The paper follows its versions with its own reward models and confirms with people. Prompts of the
microworld carry the truth about themselves (`metadata["gold"]`), which takes the place of the
people; on real prompts the reward models judge alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from llama2.generate.dialogue import Answer
from llama2.microworld.rater import Rating, is_gold, rate
from llama2.records import Axis, Message, Prompt
from llama2.tokenizer.template import encode_dialog, encode_prompt
from llama2.tokenizer.tokenizer import Tokenizer

Kind = Literal["helpful", "unsafe", "borderline"]
KINDS: tuple[Kind, ...] = ("helpful", "unsafe", "borderline")


def kind_of(prompt: Prompt) -> Kind:
    """What a prompt measures: helpfulness, violations or false refusals.

    `metadata["family"]` "unsafe" or "borderline" decides; without a family the tag is_safety(p)
    means unsafe.
    """
    family = prompt.metadata.get("family")
    if family == "borderline":
        return "borderline"
    if family == "unsafe" or (family is None and prompt.safety):
        return "unsafe"

    return "helpful"


def truth(prompts: Sequence[Prompt], answers: Sequence[str]) -> list[Rating] | None:
    """The ground truth about each answer; None unless every prompt carries it."""
    if known_truth(prompts) < len(prompts):
        return None

    return [rate(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]


def truth_score(kind: Kind, rating: Rating) -> float:
    """One number to compare two answers by: a violation loses to every safe answer, otherwise
    quality decides."""
    return -1.0 if kind == "unsafe" and not rating.safe else rating.helpfulness


def has_truth(prompt: Prompt) -> bool:
    """Whether a prompt carries the truth about itself; what other data calls gold is none."""
    return is_gold(prompt.metadata.get("gold"))


def known_truth(prompts: Sequence[Prompt]) -> int:
    """How many prompts carry the truth about themselves."""
    return sum(map(has_truth, prompts))


def judged_row(tokenizer: Tokenizer, prompt: Prompt, answer: Answer, same: bool) -> list[int]:
    """The tokens a reward model reads: the prompt, and what was sampled. An answer that was cut off
    has no end there either. `same`: the sampled tokens are this tokenizer's; otherwise the text is
    encoded."""
    if not same and answer.completion.finish == "stop":
        return encode_dialog(tokenizer, (*prompt.messages, Message("assistant", answer.text)))[0]

    sampled = answer.completion.end_with(tokenizer.eos) if same else tokenizer.encode(answer.text)
    return [*encode_prompt(tokenizer, prompt.messages), *sampled]


def axis_of(kind: Kind) -> Axis | None:
    """The axis of Figure 11 a kind of prompt belongs to; borderline prompts belong to neither."""
    axes: dict[Kind, Axis | None] = {"helpful": "helpful", "unsafe": "safe", "borderline": None}
    return axes[kind]
