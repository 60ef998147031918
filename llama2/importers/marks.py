"""Marks that other tools put on an answer: that it is bad, or that it carries no loss (§3.1).

One rule for every format. A mark on a row (`label` of KTO sets, `harmful`, `is_safe`) leaves out
the row whose answer is bad. A loss flag (`weight` of OpenAI and mistral-finetune, `train` of
axolotl, `loss`, `loss_mask`) on a turn or on a row becomes `Dialog.train`. A flag that is neither
yes nor no, such as half a weight, is refused: no record can keep it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import compress, dropwhile
from typing import Any, Literal

from llama2.importers.columns import WORD
from llama2.importers.tables import SkippedRow
from llama2.reading.files import Row
from llama2.records import Dialog, mask_turns

GOOD = frozenset(
    (
        "label",
        "kto label",
        "kto tag",
        "human label",
        "desirable",
        "good",
        "accepted",
        "acceptable",
        "accept",
        "approved",
        "correct",
        "safe",
        "preferred",
        "thumbs up",
        "upvoted",
        "liked",
        "valid",
        "passed",
        "helpful",
        "feedback",
        "verdict",
        "judgement",
        "judgment",
        "thumbs",
    )
)
"""columns that are true where the answer is good"""
BAD = frozenset(
    (
        "harmful",
        "bad",
        "unsafe",
        "toxic",
        "undesirable",
        "is rejected",
        "incorrect",
        "wrong",
        "invalid",
        "unhelpful",
        "thumbs down",
        "downvoted",
        "disliked",
        "flagged",
        "spam",
        "hallucinated",
        "hallucination",
        "discarded",
        "deleted",
    )
)
"""columns that are true where it is bad"""
_ABOUT_WHAT = frozenset(("is", "was", "human", "answer", "response", "completion", "output"))
"""words before a mark that say what is marked: `is_safe`, `answerIsCorrect`"""
LEARNT = (
    "weight",
    "train",
    "loss",
    "loss_mask",
    "mask",
    "loss_weight",
    "loss_scale",
    "training",
    "trainable",
    "learn",
    "train_on_turn",
)
"""flags that are true where a turn carries loss"""
NOT_LEARNT = ("masked", "no_loss", "ignore_loss")
"""flags that are true where it carries none"""
DETAIL = ("train_detail", "training_detail")
"""parts of a turn, which a record cannot tell apart"""

_YES = frozenset(("true", "1", "1.0", "yes", "y", "t"))
_NO = frozenset(("false", "0", "0.0", "no", "n", "f"))
_GOOD = _YES | {
    "good",
    "desirable",
    "chosen",
    "accepted",
    "positive",
    "correct",
    "safe",
    "harmless",
    "preferred",
    "thumbs up",
    "up",
    "\N{THUMBS UP SIGN}",
    "like",
    "liked",
    "approved",
    "valid",
    "pass",
    "passed",
    "helpful",
    "acceptable",
}
_BAD = _NO | {
    "-1",
    "-1.0",
    "bad",
    "undesirable",
    "rejected",
    "negative",
    "incorrect",
    "wrong",
    "unsafe",
    "harmful",
    "toxic",
    "hate",
    "reject",
    "dispreferred",
    "thumbs down",
    "down",
    "\N{THUMBS DOWN SIGN}",
    "dislike",
    "disliked",
    "disapproved",
    "invalid",
    "fail",
    "failed",
    "unhelpful",
    "unacceptable",
    "flagged",
    "spam",
}
_CURE = "write 0 or 1, or leave it out: --sources.NAME.ignore"


def is_marked_bad(row: Row) -> bool:
    """Return whether a row says that its answer is bad. A text that is no such mark is left unread;
    a number is an error."""
    for key in [*row.value] if isinstance(row.value, dict) else []:
        mark = _find_mark(key)
        value = row.get(key) if mark else None
        if value is None or value == "":
            continue

        word = _normalise(value)
        if word in (_BAD if mark in GOOD else _YES):
            return True
        if word in _GOOD | _BAD:
            continue
        if isinstance(value, (int, float)):
            raise row.error(f"'{key}' is {value}, neither good nor bad", f"{_CURE} {key}")

        row.read.discard(key)

    return False


def is_marked_unsafe(row: Row) -> bool:
    """Return whether a row without an answer says that its prompt is unsafe: `label` in words,
    `unsafe`, `harmful`, `safe`."""
    unsafe = False
    for key in [*row.value]:
        mark, word = _find_mark(key), _normalise(row.value[key])
        if mark == "label" and word in ("unsafe", "harmful", "safe", "harmless"):
            row.get(key)
            unsafe |= word in ("unsafe", "harmful")
        elif mark in ("unsafe", "harmful", "safe") and word in _YES | _NO:
            row.get(key)
            unsafe |= (word in _YES) == (mark != "safe")

    return unsafe


def parse_yes(value: Any) -> bool | None:
    """Return the truth value that is spelt in any way, None where a value is none."""
    word = _normalise(value)
    return word in _YES if word in _YES | _NO else None


def _find_mark(key: str) -> str:
    """Return the name of `GOOD` or `BAD` that a column has, "" where it has none: `is_safe` and
    `answerIsSafe` are "safe"."""
    words = [word.lower() for word in WORD.findall(str(key))]
    marked = list(dropwhile(_ABOUT_WHAT.__contains__, words))
    names = [" ".join(words)]
    if marked != ["label"]:  # `answer_label` may be a letter
        names.append(" ".join(marked))

    return next((name for name in names if name in GOOD | BAD), "")


def _normalise(value: Any) -> str:
    """Return how a mark is spelt, whatever its case and what joins its words: `Thumbs_Down` is
    "thumbs down"."""
    word = str(value).strip().lower()
    return word if word.startswith("-") else word.replace("_", " ").replace("-", " ").strip()


def read_turn_flag(turn: Row, number: int) -> bool:
    """Return whether an assistant turn carries loss; true where nothing is said."""
    for key in DETAIL:
        if turn.get(key):
            raise turn.error(
                f"turn {number}: '{key}' marks parts of the turn, a record only whole turns",
                "split the turn, or remove the key",
            )

    return all(_read_flags(turn, f"turn {number}: "))


def read_row_flags(row: Row) -> Literal["all", "last"] | tuple[bool, ...]:
    """Return what a row says of its turns: all, the last, or one truth value each. SkippedRow where
    it is not to be learnt."""
    train = row.get("train")
    masks: list[tuple[bool, ...]] = []
    for key in (*LEARNT, *NOT_LEARNT):
        value = row.get(key)
        if isinstance(value, list):
            masks.append(tuple(_read_flag(row, "", key, item) for item in value))

    if len({*masks}) > 1:
        raise row.error("its flags contradict one another", "keep one of them")
    if not all(_read_flags(row, "", "train" if train in ("all", "last") else "")):
        raise SkippedRow("not to be learnt")
    if masks:
        return masks[0]

    return "last" if train == "last" else "all"


def _read_flags(row: Row, where: str, but: str = "") -> list[bool]:
    """Return what each flag says that is no list."""
    values = {key: row.get(key) for key in (*LEARNT, *NOT_LEARNT)}
    given = [key for key in values if key != but and values[key] not in (None, "")]
    flat = [key for key in given if not isinstance(values[key], list)]
    return [_read_flag(row, where, key, values[key]) for key in flat]


def _read_flag(row: Row, where: str, key: str, value: Any) -> bool:
    word = str(value).strip().lower()
    if word not in _YES | _NO:
        raise row.error(
            f"{where}'{key}' is {value!r}; a turn is learnt or it is not", f"{_CURE} {key}"
        )

    return (word in _YES) != (key in NOT_LEARNT)


def mask_unlearnt(
    convert: Callable[[Row], Iterable[Dialog | SkippedRow]],
) -> Callable[[Row], Iterator[Dialog | SkippedRow]]:
    """Return a reader of dialogues that honours what a row says of its answers."""

    def read(row: Row) -> Iterator[Dialog | SkippedRow]:
        if is_marked_bad(row):
            raise SkippedRow("the answer is marked as bad")

        flags = read_row_flags(row)
        for item in convert(row):
            yield item if isinstance(item, SkippedRow) else _mask(row, item, flags)

    return read


def _mask(
    row: Row, dialog: Dialog, flags: Literal["all", "last"] | tuple[bool, ...]
) -> Dialog | SkippedRow:
    """Return a dialogue in which turns carry loss where both it and its row say so."""
    answers = [message.role == "assistant" for message in dialog.messages]
    if isinstance(flags, tuple) and len(flags) == len(answers):
        flags = tuple(compress(flags, answers))
    if isinstance(flags, tuple) and len(flags) != sum(answers):
        raise row.error(
            f"{len(flags)} flags for {sum(answers)} answers in {len(answers)} turns",
            "give every turn, or every answer, its flag",
        )

    before = mask_turns(dialog.messages, dialog.train)
    mask = tuple(map(all, zip(before, mask_turns(dialog.messages, flags))))
    if not any(mask):
        return SkippedRow("no turn to learn from")
    if "last" in (dialog.train, flags):
        return replace(dialog, train="last")

    return replace(dialog, train="all" if all(mask) else mask)
