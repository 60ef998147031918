"""Who judges an answer: ground truth where the prompts carry it, and the reward models (§3.4.1).

The paper follows its versions with its own reward models and confirms with people. Prompts of the microworld carry
the truth about themselves (`metadata["gold"]`), which takes the place of the people; on real prompts the reward
models judge alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

from llama2 import mesh
from llama2.errors import UserError
from llama2.generate.rewards import probability
from llama2.generate.score import rewards
from llama2.mesh import Precision
from llama2.microworld.rater import Rating, rate
from llama2.model.checkpoint import is_scorer, load_scorer
from llama2.records import Axis, Message, Prompt
from llama2.tokenizer.template import encode_dialog
from llama2.tokenizer.tokenizer import Tokenizer

Kind = Literal["helpful", "unsafe", "borderline"]
KINDS: tuple[Kind, ...] = ("helpful", "unsafe", "borderline")


def kind_of(prompt: Prompt) -> Kind:
    """What a prompt measures: helpfulness, violations or false refusals.

    `metadata["family"]` "unsafe" or "borderline" decides; without a family the tag is_safety(p) means unsafe.
    """
    family = prompt.metadata.get("family")
    if family == "borderline":
        return "borderline"
    if family == "unsafe" or (family is None and prompt.safety):
        return "unsafe"
    return "helpful"


def truth(prompts: Sequence[Prompt], answers: Sequence[str]) -> list[Rating] | None:
    """The ground truth about each answer; None unless every prompt carries it."""
    if not all("gold" in prompt.metadata for prompt in prompts):
        return None
    return [rate(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]


def truth_score(kind: Kind, rating: Rating) -> float:
    """One number to compare two answers by: a violation loses to every safe answer, otherwise quality decides."""
    return -1.0 if kind == "unsafe" and not rating.safe else rating.helpfulness


class RewardJudge:
    """One reward model as a judge: the probability sigma(r) it gives to an answer."""

    def __init__(self, directory: Path, precision: Precision = "bf16") -> None:
        if not is_scorer(directory):
            raise UserError(f"{directory}: not a reward model (it has no scalar head)",
                            "give the output directory of a `reward` run")
        self._scorer = load_scorer(directory, dtype=torch.float32, device=mesh.device()).eval()
        self._directory, self._tokenizer = directory, Tokenizer.load(directory)
        self._precision: Precision = precision

    def scores(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[float]:
        """sigma(r(x, y)) in [0, 1] of each answer. Of a dialog longer than the context the end is read."""
        context = self._scorer.config.max_position_embeddings
        rows = []
        for prompt, answer in zip(prompts, answers, strict=True):
            ids, _ = encode_dialog(self._tokenizer, (*prompt.messages, Message("assistant", answer)))
            rows.append(ids[-context:])
        return [probability(score) for score in rewards(self._scorer, rows, self._precision, name=self._directory)]


def axis_of(kind: Kind) -> Axis | None:
    """The axis of Figure 11 a kind of prompt belongs to; borderline prompts belong to neither."""
    axes: dict[Kind, Axis | None] = {"helpful": "helpful", "unsafe": "safe", "borderline": None}
    return axes[kind]
