"""What other tools say of an answer: that it is bad, or that it carries no loss (§3.1).

One rule for every format. A mark on a row (`label` of KTO sets, `harmful`, `is_safe`) leaves out
the row whose answer is bad. A loss flag (`weight` of OpenAI and mistral-finetune, `train` of
axolotl, `loss`, `loss_mask`) on a turn or on a row becomes `Dialog.train`. A flag that is neither
yes nor no, such as half a weight, is refused: no record can keep it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import dropwhile
from typing import Any, Literal

from llama2.importers.columns import WORD
from llama2.importers.tables import Skip
from llama2.reading.files import Row
from llama2.records import Dialog, trained_turns

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


def marked_bad(row: Row) -> bool:
    """Whether a row says that its answer is bad. A text that is no such mark is left unread; a
    number is an error."""
    for key in [*row.value] if isinstance(row.value, dict) else []:
        mark = _mark(key)
        value = row.get(key) if mark else None
        if value is None or value == "":
            continue

        word = _word(value)
        if word in (_BAD if mark in GOOD else _YES):
            return True

        if word not in _GOOD | _BAD:
            if isinstance(value, (int, float)):
                raise row.error(f"'{key}' is {value}, neither good nor bad", f"{_CURE} {key}")

            row.asked.discard(key)

    return False


def marked_unsafe(row: Row) -> bool:
    """Whether a row without an answer says that its prompt is unsafe: `label` in words, `unsafe`,
    `harmful`, `safe`."""
    found = False
    for key in [*row.value]:
        mark, word = _mark(key), _word(row.value[key])
        if (mark in ("unsafe", "harmful", "safe") and word in _YES | _NO) or (
            mark == "label" and word in ("unsafe", "harmful", "safe", "harmless")
        ):
            row.get(key)
            found |= word in ("unsafe", "harmful") or (
                mark != "label" and (word in _YES) == (mark != "safe")
            )

    return found


def is_yes(value: Any) -> bool | None:
    """A truth value in any spelling, None where a value is none."""
    word = _word(value)
    return True if word in _YES else False if word in _NO else None


def _mark(key: str) -> str:
    """The name of `GOOD` or `BAD` that a column has, "" where it has none: `is_safe` and
    `answerIsSafe` are "safe"."""
    words = [word.lower() for word in WORD.findall(str(key))]
    marked = list(dropwhile(_ABOUT_WHAT.__contains__, words))
    # `answer_label` may be a letter
    names = [" ".join(words), *([" ".join(marked)] if marked != ["label"] else [])]

    return next((name for name in names if name in GOOD | BAD), "")


def _word(value: Any) -> str:
    """How a mark is spelled, whatever its case and what joins its words: `Thumbs_Down` is "thumbs
    down"."""
    said = str(value).strip().lower()
    return said.replace("_", " ").replace("-", " ").strip() if not said.startswith("-") else said


def turn_flag(turn: Row, number: int) -> bool:
    """Whether an assistant turn carries loss; true where nothing is said."""
    where = f"turn {number}: "
    for key in DETAIL:
        if turn.get(key):
            raise turn.error(
                f"{where}'{key}' marks parts of the turn, a record only whole turns",
                "split the turn, or remove the key",
            )

    return _all_agree(turn, where)


def row_flags(row: Row) -> Literal["all", "last"] | tuple[bool, ...]:
    """What a row says of its turns: all, the last, or one truth value each. Skip where it is not to
    be learnt."""
    train = row.get("train")
    said: list[tuple[bool, ...]] = []
    for key in (*LEARNT, *NOT_LEARNT):
        value = row.get(key)
        if isinstance(value, list):
            said.append(tuple(_truth(row, "", key, item) for item in value))

    if len({*said}) > 1:
        raise row.error("its flags contradict one another", "keep one of them")
    if not _all_agree(row, "", "train" if train in ("all", "last") else ""):
        raise Skip("not to be learnt")

    return said[0] if said else "last" if train == "last" else "all"


def _all_agree(row: Row, where: str, but: str = "") -> bool:
    flags = [
        _truth(row, where, key, value)
        for key in (*LEARNT, *NOT_LEARNT)
        if (value := row.get(key)) is not None
        and value != ""
        and key != but
        and not isinstance(value, list)
    ]
    return all(flags)


def _truth(row: Row, where: str, key: str, value: Any) -> bool:
    word = str(value).strip().lower()
    if word not in _YES | _NO:
        raise row.error(
            f"{where}'{key}' is {value!r}; a turn is learnt or it is not", f"{_CURE} {key}"
        )

    return (word in _YES) != (key in NOT_LEARNT)


def learnt(
    convert: Callable[[Row], Iterable[Dialog | Skip]],
) -> Callable[[Row], Iterator[Dialog | Skip]]:
    """A reader of dialogues that honours what a row says of its answers."""

    def read(row: Row) -> Iterator[Dialog | Skip]:
        if marked_bad(row):
            raise Skip("the answer is marked as bad")

        flags = row_flags(row)
        for item in convert(row):
            yield item if isinstance(item, Skip) else _masked(row, item, flags)

    return read


def _masked(
    row: Row, dialog: Dialog, flags: Literal["all", "last"] | tuple[bool, ...]
) -> Dialog | Skip:
    answers = [message.role == "assistant" for message in dialog.messages]
    if isinstance(flags, tuple) and len(flags) == len(answers):
        flags = tuple(flag for flag, answer in zip(flags, answers) if answer)

    if isinstance(flags, tuple) and len(flags) != sum(answers):
        raise row.error(
            f"{len(flags)} flags for {sum(answers)} answers in {len(answers)} turns",
            "give every turn, or every answer, its flag",
        )

    mask = tuple(
        one and other
        for one, other in zip(
            trained_turns(dialog.messages, dialog.train), trained_turns(dialog.messages, flags)
        )
    )
    if not any(mask):
        return Skip("no turn to learn from")
    if dialog.train == "last" or flags == "last":
        return replace(dialog, train="last")

    return replace(dialog, train="all" if all(mask) else mask)
