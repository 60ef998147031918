"""Filled columns that no reader reads: those that a record may lose, and those that change what it
says.

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
class UnreadColumns:
    """Filled columns that nobody read: those that change the meaning, whether tools are among them,
    and the rest."""

    lost: tuple[str, ...]
    tools: bool
    harmless: tuple[str, ...]


def find_unread(row: Row, known: Collection[str] = (), worth: bool = True) -> UnreadColumns:
    """Return what nobody read of a row and of the mappings read inside it.

    known: columns that this format is known to have and not to need. worth: whether it matters how
    good an answer is, which it does not for prompts.
    """
    mappings = [part for part in _parts(row) if isinstance(part.value, dict)]
    left: list[tuple[str, Any]] = []
    for part in mappings:
        unread = [key for key in part.value if key not in part.read]
        left += [(key, part.value[key]) for key in unread if is_filled(part.value[key])]

    text = "\n".join(_texts([row.get(key) for key in row.read])) if left else ""
    lost, harmless, tools = dict[str, None](), dict[str, None](), False
    for key, value in left:
        words = [_singular(word.lower()) for word in WORD.findall(str(key))]
        if key in known or _is_harmless(words, value, text, worth):
            harmless[str(key)] = None
        elif _TOOLS & {*words}:
            tools = True
        else:
            lost[str(key)] = None

    return UnreadColumns(tuple(lost), tools, tuple(harmless))


def is_filled(value: Any) -> bool:
    """Return whether a cell says anything: null, NaN, false, blanks and empty lists of any depth do
    not."""
    if value is None or value is False or value != value:
        return False
    if isinstance(value, str):
        return value.strip() not in ("", "[]", "{}", "null")
    if isinstance(value, dict):
        return any(map(is_filled, value.values()))

    return any(map(is_filled, value)) if isinstance(value, (list, tuple)) else True


def _is_harmless(words: list[str], value: Any, text: str, worth: bool) -> bool:
    """Return whether a record may lose a column whose name has these words. `text` is all that was
    read of the row."""
    names = {*words}
    if not words:
        return True
    if _MEDIA & names:
        return False
    if words == ["number"] and _PLACEHOLDER.search(text):
        return False  # MAWPS: the numbers that stand for `number0` in the question
    if words[-1] in _DESCRIBES or words[0] in _FORMER:
        return True
    if words in _ABOUT_ALONE or (_TOOLS | _ABOUT | _OPTIONS) & names or _is_numbered(words):
        return False
    if _ASKED & names:
        return isinstance(value, str) and tidy(value) in text  # a copy of what was read

    # the code that is asked about, not that of a country
    return not worth or not (_WORTH & names or words == ["code"])


def _is_numbered(words: list[str]) -> bool:
    """`answerA`, `sol1`, `opt_2`, `A`: the answers of a multiple choice, a column each."""
    return words[0] in _NUMBERED and len(words[-1]) == 1 and len(words) <= 2


def _singular(word: str) -> str:
    return word[:-1] if len(word) > 3 and word.endswith("s") and word[-2] not in "is" else word


def _parts(row: Row) -> Iterator[Row]:
    """A row and the mappings read inside it."""
    yield row
    for part in row.parts:
        yield from _parts(part)


def _texts(value: Any) -> Iterator[str]:
    """Every text inside a value."""
    if isinstance(value, str):
        yield tidy(value)
    elif isinstance(value, (list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)
