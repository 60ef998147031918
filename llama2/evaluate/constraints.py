"""What an instruction asks of every answer and a program can check in the text (§3.3, A.3.5).

The paper's instructions are hobbies, languages and public figures, judged by people. Of these only
a language can be told from an answer as it is; of a figure or a hobby what can be checked is what
the instruction asks to say. Each check has a name and an argument, as a record carries them:
`["language", "French"]`. Whether an answer is any good the checks do not say; one that is
degenerate obeys nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llama2.errors import UserError, did_you_mean
from llama2.evaluate.conduct import find_degeneration
from llama2.evaluate.language import LANGUAGES, find_language

_EMOJI = re.compile("[\U0001f300-\U0001faff\u2600-\u27bf]")
_PLAIN = re.compile(r"[\W_]+")
_PIRATE = re.compile(
    r"\b(?:arr+|ahoy|matey|mateys|aye|ye|yer|cap['’]?n|avast|landlubber|shiver me|me hearties|"
    r"hearty|yo-ho|doubloons?|scallywags?|buccaneer)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Check:
    """One thing that every answer must do."""

    name: str
    argument: str = ""

    def passes(self, answer: str) -> bool:
        """Return whether an answer does it."""
        return _CHECKS[self.name](answer, self.argument)


def obeys_all(checks: Sequence[Check], question: str, answer: str) -> bool:
    """Return whether an answer is one, and does all that is asked for."""
    if find_degeneration(question, answer):
        return False

    return all(check.passes(answer) for check in checks)


def read_checks(rows: object, where: str) -> tuple[Check, ...]:
    """Return the checks of a record's list of [name, argument]; UserError names one that is not
    known."""
    if not isinstance(rows, list):
        raise _malformed(where)

    checks = []
    for row in rows:
        if not isinstance(row, list) or not row or not all(isinstance(part, str) for part in row):
            raise _malformed(where)

        name, argument = row[0], row[1] if len(row) > 1 else ""
        if name not in _CHECKS:
            raise UserError(f"{where}: there is no check '{name}'", did_you_mean(name, _CHECKS))
        if name == "language" and argument not in LANGUAGES:
            raise UserError(
                f"{where}: the language '{argument}' cannot be told",
                f"languages: {', '.join(LANGUAGES)}",
            )
        if name == "at most" and not argument.isdecimal():
            raise UserError(f"{where}: 'at most' needs a number of words", 'write ["at most", "9"]')

        checks.append(Check(name, argument))

    return tuple(checks)


def _malformed(where: str) -> UserError:
    return UserError(
        f"{where}: metadata.instruction.checks is no list of [name, argument]",
        'write [["language", "French"]]',
    )


# --- checks ---
def _normalize(text: str) -> str:
    """Return the words of a text, without case, signs and white space."""
    return _PLAIN.sub(" ", text.lower()).strip()


def _is_in(answer: str, language: str) -> bool:
    return find_language(answer) == language


def _starts(answer: str, start: str) -> bool:
    return f"{_normalize(answer)} ".startswith(f"{_normalize(start)} ")


def _ends(answer: str, end: str) -> bool:
    return f" {_normalize(answer)}".endswith(f" {_normalize(end)}")


def _mentions(answer: str, words: str) -> bool:
    """Return whether one of several words, separated by |, is mentioned, whatever its ending."""
    text = f" {_normalize(answer)}"
    return any(f" {_normalize(word)}" in text for word in words.split("|"))


def _is_upper(answer: str, _: str) -> bool:
    letters = [character for character in answer if character.isalpha()]
    return len(letters) > 1 and sum(letter.isupper() for letter in letters) >= 0.95 * len(letters)


def _is_lower(answer: str, _: str) -> bool:
    letters = [character for character in answer if character.isalpha()]
    return len(letters) > 1 and not any(letter.isupper() for letter in letters)


def _has_emoji(answer: str, _: str) -> bool:
    return bool(_EMOJI.search(answer))


def _talks_like_a_pirate(answer: str, _: str) -> bool:
    return bool(_PIRATE.search(answer))


def _has_three_lines(answer: str, _: str) -> bool:
    """Return whether an answer has the form of a haiku: three short lines."""
    lines = [line for line in answer.splitlines() if line.strip()]
    return len(lines) == 3 and all(len(line.split()) <= 9 for line in lines)


def _is_at_most(answer: str, words: str) -> bool:
    return 0 < len(answer.split()) <= int(words)


def _is_a_list(answer: str, _: str) -> bool:
    lines = [line.strip() for line in answer.splitlines() if line.strip()]
    items = [line for line in lines if re.match(r"(?:[-*•]|\d+[.)])\s", line)]
    return len(items) >= 2 and 2 * len(items) >= len(lines)


_CHECKS: dict[str, Callable[[str, str], bool]] = {
    "language": _is_in,
    "starts": _starts,
    "ends": _ends,
    "mentions": _mentions,
    "upper case": _is_upper,
    "lower case": _is_lower,
    "emoji": _has_emoji,
    "pirate": _talks_like_a_pirate,
    "three lines": _has_three_lines,
    "at most": _is_at_most,
    "list": _is_a_list,
}
