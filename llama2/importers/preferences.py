"""Importers of public human preference data (§3.2.1, Table 6) into `records.Preference`.

Among the formats are those of all seven open sets of Table 6. Three conventions hold for every one
of them:

- the degree of §3.2.1 is "better" (the margin of a middling pair) but for the one set whose
annotators stated it
  (HelpSteer2); scores of two answers decide ties and nothing else, for no two sets score alike;
- public sets do not tell in which order the answers were shown, so the order is drawn from a hash
of the two texts,
  never of the label: position carries no information, and the same file always gives the same
  order;
- a well-formed row that teaches nothing (a tie, an empty or identical answer) is skipped and
counted by reason; a
  malformed row is an error that names file and line.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from llama2.hashing import hash_parts
from llama2.importers.questions import asked, category_of, system
from llama2.importers.scores import by_score
from llama2.importers.tables import AUTO, Format, Reading, Skip, convert, sample
from llama2.importers.transcripts import is_transcript, join, messages, prompt, transcript, turn
from llama2.reading.files import Row, tidy
from llama2.records import Axis, Degree, Message, Messages, Preference, Response, SafetyLabel, parse
from llama2.tally import Tally

_HARMLESS = re.compile(
    r"(hh.*[-_])?harmless([-_]base)?([-_.](train|test|valid|validation|dev|eval).*)?", re.IGNORECASE
)


class Pair(NamedTuple):
    """A comparison before it has an id and a display order."""

    prompt: Messages
    chosen: str
    rejected: str
    axis: Axis | None = None
    safety: SafetyLabel | None = None
    category: str = ""
    degree: Degree = "better"


def import_preferences(
    path: str | os.PathLike[str],
    how: Reading = AUTO,
    axis: Axis | None = None,
    name: str = "",
    tally: Tally | None = None,
) -> Iterator[Preference]:
    """The comparisons in a file, a directory of files or a zip archive.

    how: the format, one of `PREFERENCE_FORMATS` or "auto", and what becomes of malformed rows.
    axis: what the answers were compared for; None: what the format says (PKU-SafeRLHF), "safe" for
    Anthropic's harmless sets, which the name of the file or of its directory tells, else "helpful".
    name: the set, kept as `metadata["source"]`; "" takes the name of the file. tally: counts rows
    read, records kept and skipped by reason, and the axis of those kept.
    """
    tally = Tally() if tally is None else tally
    for row, pair in convert(path, PREFERENCE_FORMATS, how, tally):
        reason = "other axis" if axis and pair.axis and axis != pair.axis else _useless(pair)
        if reason:
            tally.skip(reason)
            continue

        try:
            preference = (
                pair
                if isinstance(pair, Preference)
                else _preference(pair, axis or pair.axis or _axis(row), name or row.name)
            )
        except ValueError as error:
            if how.malformed == "stop":
                raise row.error(str(error)) from None

            tally.skip("malformed")
            continue

        tally.kept += 1
        tally.note("axis", preference.axis)
        yield preference


def _axis(row: Row) -> Axis:
    """What a set was compared for, by the names that Anthropic gave to its files and
    directories."""
    file, _, member = row.where.rpartition(":")[0].partition("!")
    names = [part.partition(".")[0] for part in (*Path(file).parts[-2:], *Path(member).parts[-2:])]
    return "safe" if any(map(_HARMLESS.fullmatch, names)) else "helpful"


def _useless(pair: Pair | Preference) -> str:
    chosen, rejected = (
        (pair.chosen.text, pair.rejected.text) if isinstance(pair, Preference) else pair[1:3]
    )
    if not all(message.content.strip() for message in pair.prompt):
        return "empty turn"
    if not chosen.strip() or not rejected.strip():
        return "empty answer"

    return "identical answers" if tidy(chosen) == tidy(rejected) else ""


def _preference(pair: Pair, axis: Axis, source: str) -> Preference:
    low, high = sorted((pair.chosen, pair.rejected))
    turns = json.dumps([(m.role, m.content) for m in pair.prompt])
    key = hash_parts(turns, low, high)
    shown = (low, high) if key & 1 else (high, low)
    preferred: Literal[0, 1] = 0 if shown[0] == pair.chosen else 1
    metadata = {"source": source} | ({"category": pair.category} if pair.category else {})

    return Preference(
        f"{source}:{axis}:{key:016x}",
        pair.prompt,
        (Response(shown[0]), Response(shown[1])),
        preferred,
        pair.degree,
        pair.safety,
        axis,
        metadata=metadata,
    )


def _answer(row: Row, key: str) -> str:
    """An answer as text: a text, one assistant turn, or a list of turns of which the last
    counts."""
    value = row.get(key)
    if value is None:
        raise row.error(f"a preference needs two answers: '{key}' is missing")
    if isinstance(value, str):
        return tidy(value)

    last = turn(row, value) if isinstance(value, dict) else (messages(row, value) or (None,))[-1]
    if last is None or last.role != "assistant":
        raise row.error(
            f"a preference needs two answers: '{key}' does not end with an assistant turn"
        )

    return last.content


def _labelled(row: Row, key: str, first: Any, second: Any, tie: Any = None) -> bool | None:
    """True: the first answer is preferred, False: the second, None: a tie. 1.0, "1" and true are
    1."""
    label = _plain(row.get(key))
    if label in (str(first), str(second)):
        return label == str(first)
    if tie is not None and label == str(tie):
        return None

    raise row.error(f"'{key}' must be {first} or {second}, it is {label!r}")


def _plain(value: Any) -> str:
    word = str(value).strip()
    return {"true": "1", "false": "0"}.get(word.lower(), word.removesuffix(".0"))


def _ordered(turns: Messages, answers: tuple[str, str], first: bool | None, **more: Any) -> Pair:
    if first is None:
        raise Skip("tie")

    return Pair(turns, answers[not first], answers[first], **more)


def _ours(row: Row) -> Iterator[Preference]:
    responses = row.get("responses")
    if not isinstance(responses, list) or len(responses) != 2:
        raise row.error("a preference needs two answers")
    if row.get("preferred") is None:
        raise Skip("not judged yet")

    yield parse(Preference, json.dumps(row.whole()), row.where)


def _transcripts(row: Row) -> Iterator[Pair]:
    """Anthropic HH-RLHF, and HHH evaluations: two whole dialogues that differ in their last
    answer."""
    keys = ("text_correct", "text_incorrect") if row.get("text_correct") else ("chosen", "rejected")
    for key in keys:
        if row.get(key) is None:
            raise row.error(f"a preference needs two answers: '{key}' is missing")

    better, worse = (transcript(row.text(key)) for key in keys)
    if not better or not worse:
        raise row.error('no "Human:" turn in the dialogue')
    if "user" in (better[-1].role, worse[-1].role):
        raise Skip("ends with a human turn")
    if better[:-1] != worse[:-1]:
        raise Skip("earlier turns differ")

    turns = better[:-1]
    if not turns or any(
        message.role != ("user", "assistant")[i % 2] for i, message in enumerate(turns)
    ):
        raise Skip("roles do not alternate")

    yield Pair(turns, better[-1].content, worse[-1].content)


def _pairs(row: Row) -> Iterator[Pair]:
    """`prompt`, `chosen`, `rejected`, each a text or a list of turns; without `prompt` it is what
    both lists share."""
    better, worse = _side(row, "chosen"), _side(row, "rejected")
    if better[:-1] != worse[:-1]:
        raise Skip("earlier turns differ")

    turns = _before(row, better[:-1]) if better[:-1] else asked(row, _PROMPTS)
    yield Pair(turns, better[-1].content, worse[-1].content)


def _side(row: Row, key: str) -> Messages:
    """The turns of one answer, of which the last is the answer itself."""
    value = row.get(key)
    turns = messages(row, value) if isinstance(value, list) and value else ()
    return (*turns[:-1], Message("assistant", _answer(row, key)))


def _before(row: Row, shared: Messages) -> Messages:
    """The prompt of answers that are lists of turns: whole conversations, or what follows after
    `prompt`."""
    given = asked(row, _PROMPTS) if any(row.get(key) for key in _PROMPTS) else ()
    if given and (shared[0].role == "assistant" or given[-1].role == "assistant"):
        return (*given, *shared)
    if given and given[-1] not in shared:
        raise Skip("prompt and answers differ")

    said = system(row)
    first = (
        given[:1]
        if given and given[0].role == "system"
        else (Message("system", said),)
        if said
        else ()
    )
    return shared if shared[0].role == "system" else (*first, *shared)


def _openai(row: Row) -> Iterator[Pair]:
    given = row.get("input")
    inner = row.part(given) if isinstance(given, dict) else row
    if inner is not row:
        inner.asked.add("parallel_tool_calls")

    turns = messages(row, inner.get("messages") if inner is not row else given)
    yield Pair(turns, _answer(row, "preferred_output"), _answer(row, "non_preferred_output"))


def _sharegpt(row: Row) -> Iterator[Pair]:
    turns = messages(row, row.get("conversations"), system(row))
    yield Pair(turns, _answer(row, "chosen"), _answer(row, "rejected"))


def _helpsteer(row: Row) -> Iterator[Pair]:
    """HelpSteer2: which of two answers is better, and how much: -3 the first, much; 0 a tie; 3 the
    second, much."""
    degrees: dict[str, Degree] = {"3": "significantly", "2": "better", "1": "slightly"}
    strength = _plain(row.get("preference_strength"))
    degree = degrees.get(strength.removeprefix("-"))

    if degree is None and strength not in ("0", "-0"):
        raise row.error(
            f"'preference_strength' must be a whole number from -3 to 3, it is {strength!r}"
        )

    answers = (_answer(row, "response_1"), _answer(row, "response_2"))
    pair = _ordered(asked(row, _PROMPTS), answers, strength.startswith("-") if degree else None)
    yield pair._replace(degree=degree or "better")


def _labelled_pair(
    first_key: str,
    second_key: str,
    label_key: str,
    first: Any,
    second: Any,
    *prompt_keys: str,
    tie: Any = None,
) -> Callable[[Row], Iterator[Pair]]:
    """A format with two answers and a label that names the better one."""

    def read(row: Row) -> Iterator[Pair]:
        answers = (_answer(row, first_key), _answer(row, second_key))
        said = join(*(row.text(key, optional=index > 0) for index, key in enumerate(prompt_keys)))
        yield _ordered(
            prompt(said),
            answers,
            _labelled(row, label_key, first, second, tie),
            category=category_of(row, "scenario"),
        )

    return read


def _stack_exchange(row: Row) -> Iterator[Pair]:
    yield Pair(prompt(row.text("question")), _answer(row, "response_j"), _answer(row, "response_k"))


def _fine_grained(row: Row) -> Iterator[Pair | Skip]:
    """Four answers and a verdict for each of their six pairs: 0 equal, 1 the first, 2 the second.

    The passages from which the answers were made are left out, as in WebGPT's set: the question
    alone is the prompt.
    """
    verdicts, turns = row.get("preference"), prompt(row.text("question"))
    answers = [_answer(row, f"prediction {number}") for number in (1, 2, 3, 4)]
    pairs = list(itertools.combinations(answers, 2))

    if not isinstance(verdicts, list) or len(verdicts) != len(pairs):
        raise row.error(f"'preference' must be a list of {len(pairs)} verdicts")

    for answer_pair, verdict in zip(pairs, verdicts):
        if verdict not in (0, 1, 2):
            raise row.error(f"a verdict must be 0, 1 or 2, one is {verdict!r}")

        yield _ordered(turns, answer_pair, verdict == 1) if verdict else Skip("tie")


def _pku(row: Row) -> Iterator[Pair | Skip]:
    """PKU-SafeRLHF: one comparison on each axis; where both meet our three bins, with the safety
    label."""
    answers = (_answer(row, "response_0"), _answer(row, "response_1"))
    turns = prompt(row.text("prompt"))
    safe = [_labelled(row, f"is_response_{index}_safe", 1, 0) is True for index in (0, 1)]
    axes: tuple[tuple[str, Axis], ...] = (
        ("better_response_id", "helpful"),
        ("safer_response_id", "safe"),
    )

    for key, axis in axes:
        first = _labelled(row, key, 0, 1) is True
        better, worse = (safe[0], safe[1]) if first else (safe[1], safe[0])
        label: SafetyLabel | None = (
            "both" if worse and better else "preferred_only" if better else "neither"
        )

        if worse and not better:
            label = None  # §3.2.1 has no bin for an unsafe answer preferred to a safe one
            if axis == "safe":
                yield Skip("the safer answer is labelled unsafe")
                continue

        yield _ordered(turns, answers, first, axis=axis, safety=label)


def _webgpt(row: Row) -> Iterator[Pair]:
    """OpenAI WebGPT comparisons: a preference score for each answer, 0 for a tie."""
    question = row.get("question")
    said = row.part(question).get("full_text") if isinstance(question, dict) else question
    if not isinstance(said, str):
        raise row.error("'question' has no text")

    answers = (_answer(row, "answer_0"), _answer(row, "answer_1"))
    try:
        first, second = float(row.get("score_0")), float(row.get("score_1"))
    except (TypeError, ValueError):
        raise row.error("'score_0' and 'score_1' must be numbers") from None

    yield _ordered(prompt(said), answers, None if first == second else first > second)


def _summarize(row: Row) -> Iterator[Pair]:
    """OpenAI "summarize from feedback" comparisons."""
    info, summaries = row.get("info"), row.get("summaries")
    if not isinstance(summaries, list) or len(summaries) != 2:
        raise row.error("a preference needs two answers: 'summaries' must be a list of two")

    about = row.part(info)
    said = join(
        "Summarize the following text.",
        about.text("title", optional=True),
        about.text("post", "article"),
    )
    answers = tuple(row.part(item).text("text") for item in summaries)
    yield _ordered(
        (Message("user", said),), (answers[0], answers[1]), _labelled(row, "choice", 0, 1)
    )


def _arena(row: Row) -> Iterator[Pair]:
    """Chatbot Arena: two whole conversations with the same questions and a winner."""
    conversations = [messages(row, row.get(key)) for key in ("conversation_a", "conversation_b")]
    if not all(conversations):
        raise row.error("a preference needs two answers: a conversation is empty")
    if conversations[0][:-1] != conversations[1][:-1]:
        raise Skip("earlier turns differ")

    winner = str(row.get("winner")).lower()
    first = (
        None
        if winner.startswith(("tie", "both", "draw"))
        else _labelled(row, "winner", "model_a", "model_b")
    )
    yield _ordered(
        conversations[0][:-1], (conversations[0][-1].content, conversations[1][-1].content), first
    )


def _has_transcripts(row: Row) -> bool:
    """Whether the answers are transcripts; a row without them cannot say that they are not."""
    better = row.get("text_correct") or row.get("chosen")
    return better in (None, "") or is_transcript(better)


_PROMPTS = ("prompt", "question", "instruction", "query", "input")
_SAMPLES = ("prompt", "corrects", "incorrects")
_READERS: tuple[Format[Pair | Preference], ...] = (
    Format("preference", ("responses", "preferred"), _ours),
    Format("openai", ("preferred_output|non_preferred_output",), _openai),
    Format("sharegpt-pairs", ("conversations", "chosen|rejected"), _sharegpt),
    Format("hh", ("chosen|text_correct",), _transcripts, _has_transcripts, known=_SAMPLES),
    Format("pairs", ("chosen|rejected",), _pairs, known=("text", "messages")),
    Format(
        "auto-j",
        ("response 1|response 2", "label"),
        _labelled_pair("response 1", "response 2", "label", 0, 1, "prompt", tie=2),
    ),
    Format(
        "alpaca-farm",
        ("instruction", "output_1", "output_2", "preference"),
        _labelled_pair("output_1", "output_2", "preference", 1, 2, "instruction", "input", tie=0),
    ),
    Format(
        "llmbar",
        ("input", "output_1|output_2", "label"),
        _labelled_pair("output_1", "output_2", "label", 1, 2, "input"),
    ),
    Format("helpsteer", ("prompt", "response_1|response_2", "preference_strength"), _helpsteer),
    Format("stack-exchange", ("question", "response_j|response_k"), _stack_exchange),
    Format(
        "fine-grained",
        ("question", "prediction 1", "preference"),
        _fine_grained,
        known=("passages",),
    ),
    Format("pku", ("prompt", "response_0|response_1", "safer_response_id"), _pku),
    Format(
        "shp",
        ("history", "human_ref_A|human_ref_B"),
        _labelled_pair("human_ref_A", "human_ref_B", "labels", 1, 0, "history"),
        known=("score_A", "score_B", "score_ratio"),
    ),
    Format("webgpt", ("question", "answer_0|answer_1"), _webgpt),
    Format("summarize", ("info", "summaries", "choice"), _summarize),
    Format("arena", ("conversation_a|conversation_b", "winner"), _arena),
)
PREFERENCE_FORMATS = tuple(
    f if f.name == "preference" else replace(f, convert=by_score(f.convert)) for f in _READERS
)


def holds_preferences(path: str | os.PathLike[str], format: str = "auto") -> bool:
    """Whether a path holds comparisons: most rows of the first file that has any."""
    if format != "auto":
        return any(f.name == format for f in PREFERENCE_FORMATS)

    for rows in sample(path):
        found = sum(any(f.matches(row) for f in PREFERENCE_FORMATS) for row in rows)
        if found:
            return 2 * found >= len(rows)

    return False
