"""Filled columns that no reader asked for: those that a record may lose, and those that change what
it says.

Readers recognise a format by the keys it needs. A further key is harmless (`id`, `source`, `date`),
or it is what the question is about, what the answer was chosen from, or how good the answer is.
Names tell them apart, word by word: `reading_passage`, `passages` and `Passage` are passages,
`passage_id` is a number. `tables` refuses the second kind.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from llama2.reading.files import Row, tidy

_ABOUT = frozenset(
    (
        "context",
        "passage",
        "document",
        "doc",
        "article",
        "background",
        "knowledge",
        "evidence",
        "paragraph",
        "body",
        "story",
        "premise",
        "hypothesis",
        "excerpt",
        "fact",
        "hint",
        "table",
        "schema",
        "persona",
        "personality",
        "constraint",
        "prefix",
        "suffix",
        "support",
        "selftext",
        "history",
        "input",
        "system",
        "abstract",
        "chunk",
        "snippet",
        "ctx",
        "sentence",
        "scenario",
        "dialogue",
        "dialog",
        "transcript",
        "role",
        "speaker",
        "definition",
        "guideline",
        "requirement",
        "rule",
        "demonstration",
        "exemplar",
    )
)
_ABOUT_ALONE = (["content"], ["post"])
"""names that say so when no other word stands beside them (`reasoning_content` is no matter)"""
_ASKED = frozenset(("question", "prompt", "instruction", "query", "problem", "text"))
_OPTIONS = frozenset(
    (
        "option",
        "choice",
        "candidate",
        "ending",
        "distractor",
        "opa",
        "opb",
        "opc",
        "opd",
        "chosen",
        "rejected",
    )
)
_NUMBERED = frozenset(("answer", "ans", "sol", "solution", "opt", "a", "b", "c", "d", "e"))
_MEDIA = frozenset(("image", "img", "picture", "video", "audio", "media", "attachment"))
_WORTH = frozenset(
    (
        "score",
        "rating",
        "reward",
        "margin",
        "weight",
        "helpfulness",
        "correctness",
        "advantage",
        "quality",
    )
)
_TOOLS = frozenset(("tool", "function", "plugin"))
_DESCRIBES = frozenset(
    (
        "id",
        "idx",
        "index",
        "url",
        "uri",
        "link",
        "type",
        "kind",
        "len",
        "length",
        "count",
        "num",
        "number",
        "name",
        "title",
        "date",
        "time",
        "lang",
        "language",
        "hash",
        "token",
        "source",
        "start",
        "end",
        "category",
        "dataset",
        "version",
        "model",
        "fingerprint",
    )
)
_FORMER = frozenset(("original", "orig", "raw", "seed", "labelling"))
_PLACEHOLDER = re.compile(r"\bnumber\d\b")
WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")


@dataclass(frozen=True)
class Unread:
    """Filled columns that nobody read: those that change the meaning, whether tools are among them,
    and the rest."""

    lost: tuple[str, ...]
    tools: bool
    harmless: tuple[str, ...]


def unread(row: Row, known: Collection[str] = (), worth: bool = True) -> Unread:
    """What nobody asked for in a row and in the mappings read inside it.

    known: columns that this format is known to have and not to need. worth: whether it matters how
    good an answer is, which it does not for prompts.
    """
    left = [
        (key, value)
        for place in (row, *_inner(row))
        if isinstance(place.value, dict)
        for key, value in place.value.items()
        if key not in place.asked and is_filled(value)
    ]
    read = "\n".join(_texts(_read(row))) if left else ""
    lost, harmless, tools = list[str](), list[str](), False

    for key, value in left:
        words = [_singular(word.lower()) for word in WORD.findall(str(key))]
        if key in known or _is_harmless(words, value, read, worth):
            harmless.append(str(key))
        elif _TOOLS & {*words}:
            tools = True
        else:
            lost.append(str(key))

    return Unread(tuple(dict.fromkeys(lost)), tools, tuple(dict.fromkeys(harmless)))


def is_filled(value: Any) -> bool:
    """Whether a cell says anything: null, NaN, false, blanks and empty lists of any depth do
    not."""
    if value is None or value is False or value != value:
        return False
    if isinstance(value, str):
        return value.strip() not in ("", "[]", "{}", "null")
    if isinstance(value, dict):
        return any(map(is_filled, value.values()))

    return any(map(is_filled, value)) if isinstance(value, (list, tuple)) else True


def _is_harmless(words: list[str], value: Any, read: str, worth: bool) -> bool:
    if not words:
        return True

    found = {*words}
    if _MEDIA & found:
        return False
    if words == ["number"] and _PLACEHOLDER.search(read):
        return False  # MAWPS: the numbers that stand for `number0` in the question
    if words[-1] in _DESCRIBES or words[0] in _FORMER:
        return True
    if (
        words in _ABOUT_ALONE
        or _TOOLS & found
        or _ABOUT & found
        or _OPTIONS & found
        or _is_numbered(words)
    ):
        return False
    if _ASKED & found:
        return isinstance(value, str) and tidy(value) in read  # a copy of what was read

    # the code that is asked about, not that of a country
    return not worth or not (_WORTH & found or words == ["code"])


def _is_numbered(words: list[str]) -> bool:
    """`answerA`, `sol1`, `opt_2`, `A`: the answers of a multiple choice, a column each."""
    return words[0] in _NUMBERED and len(words[-1]) == 1 and len(words) <= 2


def _singular(word: str) -> str:
    return word[:-1] if len(word) > 3 and word.endswith("s") and word[-2] not in "is" else word


def _inner(row: Row) -> Iterator[Row]:
    for part in row.parts:
        yield part
        yield from _inner(part)


def _read(row: Row) -> list[Any]:
    return (
        [row.value[key] for key in row.asked if key in row.value]
        if isinstance(row.value, dict)
        else []
    )


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield tidy(value)
    elif isinstance(value, (list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)
