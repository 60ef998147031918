"""The public formats of comparisons (§3.2.1, Table 6), each with a reader of its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import combinations, cycle
from typing import Any, NamedTuple

from llama2.importers.questions import read_category, read_question, read_system
from llama2.importers.scores import drop_by_score
from llama2.importers.tables import (
    RowFormat,
    SkippedRow,
)
from llama2.importers.turns import (
    is_transcript,
    join,
    read_own,
    read_prompt,
    read_turn,
    read_turns,
    split_transcript,
)
from llama2.reading.files import Row, tidy
from llama2.records import Axis, Degree, Message, Messages, Preference, SafetyLabel

_DEGREES: dict[str, Degree] = {"3": "significantly", "2": "better", "1": "slightly"}
"""the strengths of HelpSteer2, of which the sign says which answer is better"""
_PROMPTS = ("prompt", "question", "instruction", "query", "input")
_SAMPLES = ("prompt", "corrects", "incorrects")


class RatedPair(NamedTuple):
    """Two answers and which is better, before they have an id and a display order."""

    prompt: Messages
    chosen: str
    rejected: str
    axis: Axis | None = None
    safety: SafetyLabel | None = None
    category: str = ""
    degree: Degree = "better"


# --- two answers ---


def _read_answer(row: Row, key: str) -> str:
    """Return an answer as text: a text, one assistant turn, or a list of turns of which the last
    counts."""
    value = row.get(key)
    if value is None:
        raise row.error(f"a preference needs two answers: '{key}' is missing")
    if isinstance(value, str):
        return tidy(value)

    turns = (read_turn(row, value),) if isinstance(value, dict) else read_turns(row, value)
    if not turns or turns[-1].role != "assistant":
        raise row.error(
            f"a preference needs two answers: '{key}' does not end with an assistant turn"
        )

    return turns[-1].content


def _read_label(row: Row, key: str, first: Any, second: Any, tie: Any = None) -> bool | None:
    """Return True where the first answer is preferred, False for the second, None for a tie. 1.0,
    "1" and true are 1."""
    label = _spell(row.get(key))
    if label in (str(first), str(second)):
        return label == str(first)
    if tie is not None and label == str(tie):
        return None

    raise row.error(f"'{key}' must be {first} or {second}, it is {label!r}")


def _spell(value: Any) -> str:
    word = str(value).strip()
    return {"true": "1", "false": "0"}.get(word.lower(), word.removesuffix(".0"))


def _order(turns: Messages, answers: tuple[str, str], first: bool | None, **more: Any) -> RatedPair:
    """Return the comparison in which the first answer is the better one, or the second."""
    if first is None:
        raise SkippedRow("tie")

    return RatedPair(turns, answers[not first], answers[first], **more)


# --- formats ---


def _read_own(row: Row) -> Iterator[Preference]:
    responses = row.get("responses")
    if not isinstance(responses, list) or len(responses) != 2:
        raise row.error("a preference needs two answers")
    if row.get("preferred") is None:
        raise SkippedRow("not judged yet")

    yield from read_own(Preference)(row)


def _read_transcripts(row: Row) -> Iterator[RatedPair]:
    """Anthropic HH-RLHF, and HHH evaluations: two whole dialogues that differ in their last
    answer."""
    keys = ("text_correct", "text_incorrect") if row.get("text_correct") else ("chosen", "rejected")
    for key in keys:
        if row.get(key) is None:
            raise row.error(f"a preference needs two answers: '{key}' is missing")

    better, worse = (split_transcript(row.text(key)) for key in keys)
    if not better or not worse:
        raise row.error('no "Human:" turn in the dialogue')
    if "user" in (better[-1].role, worse[-1].role):
        raise SkippedRow("ends with a human turn")
    if better[:-1] != worse[:-1]:
        raise SkippedRow("earlier turns differ")

    turns = better[:-1]
    roles = zip((message.role for message in turns), cycle(("user", "assistant")))
    if not turns or any(role != expected for role, expected in roles):
        raise SkippedRow("roles do not alternate")

    yield RatedPair(turns, better[-1].content, worse[-1].content)


def _has_transcripts(row: Row) -> bool:
    """Return whether the answers are transcripts; a row without them cannot say that they are
    not."""
    better = row.get("text_correct") or row.get("chosen")
    return better in (None, "") or is_transcript(better)


def _read_pairs(row: Row) -> Iterator[RatedPair]:
    """`prompt`, `chosen`, `rejected`, each a text or a list of turns; without `prompt` it is what
    both lists share."""
    better, worse = _read_side(row, "chosen"), _read_side(row, "rejected")
    if better[:-1] != worse[:-1]:
        raise SkippedRow("earlier turns differ")

    shared = better[:-1]
    turns = _read_before(row, shared) if shared else read_question(row, _PROMPTS)
    yield RatedPair(turns, better[-1].content, worse[-1].content)


def _read_side(row: Row, key: str) -> Messages:
    """Return the turns of one answer, of which the last is the answer itself."""
    value = row.get(key)
    turns = read_turns(row, value) if isinstance(value, list) and value else ()
    return (*turns[:-1], Message("assistant", _read_answer(row, key)))


def _read_before(row: Row, shared: Messages) -> Messages:
    """Return the prompt of answers that are lists of turns: whole conversations, or what follows
    after `prompt`."""
    given: Messages = ()
    if any(row.get(key) for key in _PROMPTS):
        given = read_question(row, _PROMPTS)
    if given and "assistant" in (shared[0].role, given[-1].role):
        return (*given, *shared)
    if given and given[-1] not in shared:
        raise SkippedRow("prompt and answers differ")

    system = read_system(row)
    if shared[0].role == "system":
        return shared
    if given and given[0].role == "system":
        return (given[0], *shared)

    return (Message("system", system), *shared) if system else shared


def _read_openai(row: Row) -> Iterator[RatedPair]:
    written = row.get("input")
    if isinstance(written, dict):
        part = row.part(written)
        part.read.add("parallel_tool_calls")
        written = part.get("messages")

    turns = read_turns(row, written)
    answers = _read_answer(row, "preferred_output"), _read_answer(row, "non_preferred_output")
    yield RatedPair(turns, *answers)


def _read_sharegpt(row: Row) -> Iterator[RatedPair]:
    turns = read_turns(row, row.get("conversations"), read_system(row))
    yield RatedPair(turns, _read_answer(row, "chosen"), _read_answer(row, "rejected"))


def _read_helpsteer(row: Row) -> Iterator[RatedPair]:
    """HelpSteer2: which of two answers is better, and how much: -3 the first, much; 0 a tie; 3 the
    second, much."""
    strength = _spell(row.get("preference_strength"))
    degree = _DEGREES.get(strength.removeprefix("-"))
    if degree is None and strength not in ("0", "-0"):
        raise row.error(
            f"'preference_strength' must be a whole number from -3 to 3, it is {strength!r}"
        )

    answers = (_read_answer(row, "response_1"), _read_answer(row, "response_2"))
    first = strength.startswith("-") if degree else None
    yield _order(read_question(row, _PROMPTS), answers, first, degree=degree)


def _read_labelled(
    answer_keys: tuple[str, str],
    label_key: str,
    labels: tuple[int, int],
    *prompt_keys: str,
    tie: int | None = None,
) -> Callable[[Row], Iterator[RatedPair]]:
    """Return a reader of two answers and a label that names the better one."""

    def read(row: Row) -> Iterator[RatedPair]:
        answers = (_read_answer(row, answer_keys[0]), _read_answer(row, answer_keys[1]))
        first, *others = prompt_keys
        turns = read_prompt(
            join(row.text(first), *(row.text(key, optional=True) for key in others))
        )
        label = _read_label(row, label_key, *labels, tie)
        yield _order(turns, answers, label, category=read_category(row, "scenario"))

    return read


def _read_stack_exchange(row: Row) -> Iterator[RatedPair]:
    turns = read_prompt(row.text("question"))
    yield RatedPair(turns, _read_answer(row, "response_j"), _read_answer(row, "response_k"))


def _read_fine_grained(row: Row) -> Iterator[RatedPair | SkippedRow]:
    """Four answers and a verdict for each of their six pairs: 0 equal, 1 the first, 2 the second.

    The passages from which the answers were made are left out, as in WebGPT's set: the question
    alone is the prompt.
    """
    verdicts, turns = row.get("preference"), read_prompt(row.text("question"))
    answers = [_read_answer(row, f"prediction {number}") for number in (1, 2, 3, 4)]
    pairs = list(combinations(answers, 2))
    if not isinstance(verdicts, list) or len(verdicts) != len(pairs):
        raise row.error(f"'preference' must be a list of {len(pairs)} verdicts")

    for pair, verdict in zip(pairs, verdicts):
        if verdict not in (0, 1, 2):
            raise row.error(f"a verdict must be 0, 1 or 2, one is {verdict!r}")

        yield _order(turns, pair, verdict == 1) if verdict else SkippedRow("tie")


def _read_pku(row: Row) -> Iterator[RatedPair | SkippedRow]:
    """PKU-SafeRLHF: one comparison on each axis; where both meet our three bins, with the safety
    label."""
    answers = (_read_answer(row, "response_0"), _read_answer(row, "response_1"))
    turns = read_prompt(row.text("prompt"))
    safe = [_read_label(row, f"is_response_{index}_safe", 1, 0) is True for index in (0, 1)]
    axes: dict[Axis, str] = {"helpful": "better_response_id", "safe": "safer_response_id"}
    for axis, key in axes.items():
        first = _read_label(row, key, 0, 1) is True
        better, worse = safe if first else reversed(safe)
        label: SafetyLabel | None = "neither"
        if better:
            label = "both" if worse else "preferred_only"
        elif worse:
            label = None  # §3.2.1 has no bin for an unsafe answer preferred to a safe one

        if label is None and axis == "safe":
            yield SkippedRow("the safer answer is labelled unsafe")
        else:
            yield _order(turns, answers, first, axis=axis, safety=label)


def _read_webgpt(row: Row) -> Iterator[RatedPair]:
    """OpenAI WebGPT comparisons: a preference score for each answer, 0 for a tie."""
    question = row.get("question")
    if isinstance(question, dict):
        question = row.part(question).get("full_text")
    if not isinstance(question, str):
        raise row.error("'question' has no text")

    answers = (_read_answer(row, "answer_0"), _read_answer(row, "answer_1"))
    try:
        first, second = float(row.get("score_0")), float(row.get("score_1"))
    except (TypeError, ValueError):
        raise row.error("'score_0' and 'score_1' must be numbers") from None

    yield _order(read_prompt(question), answers, None if first == second else first > second)


def _read_summaries(row: Row) -> Iterator[RatedPair]:
    """OpenAI "summarize from feedback" comparisons."""
    info, summaries = row.get("info"), row.get("summaries")
    if not isinstance(summaries, list) or len(summaries) != 2:
        raise row.error("a preference needs two answers: 'summaries' must be a list of two")

    part = row.part(info)
    title, post = part.text("title", optional=True), part.text("post", "article")
    turns = (Message("user", join("Summarize the following text.", title, post)),)
    first, second = (row.part(summary).text("text") for summary in summaries)
    yield _order(turns, (first, second), _read_label(row, "choice", 0, 1))


def _read_arena(row: Row) -> Iterator[RatedPair]:
    """Chatbot Arena: two whole conversations with the same questions and a winner."""
    first = read_turns(row, row.get("conversation_a"))
    second = read_turns(row, row.get("conversation_b"))
    if not first or not second:
        raise row.error("a preference needs two answers: a conversation is empty")
    if first[:-1] != second[:-1]:
        raise SkippedRow("earlier turns differ")

    label = None
    if not str(row.get("winner")).lower().startswith(("tie", "both", "draw")):
        label = _read_label(row, "winner", "model_a", "model_b")

    yield _order(first[:-1], (first[-1].content, second[-1].content), label)


_READERS: tuple[RowFormat[RatedPair | Preference], ...] = (
    RowFormat("preference", ("responses", "preferred"), _read_own),
    RowFormat("openai", ("preferred_output|non_preferred_output",), _read_openai),
    RowFormat("sharegpt-pairs", ("conversations", "chosen|rejected"), _read_sharegpt),
    RowFormat("hh", ("chosen|text_correct",), _read_transcripts, _has_transcripts, known=_SAMPLES),
    RowFormat("pairs", ("chosen|rejected",), _read_pairs, known=("text", "messages")),
    RowFormat(
        "auto-j",
        ("response 1|response 2", "label"),
        _read_labelled(("response 1", "response 2"), "label", (0, 1), "prompt", tie=2),
    ),
    RowFormat(
        "alpaca-farm",
        ("instruction", "output_1", "output_2", "preference"),
        _read_labelled(
            ("output_1", "output_2"), "preference", (1, 2), "instruction", "input", tie=0
        ),
    ),
    RowFormat(
        "llmbar",
        ("input", "output_1|output_2", "label"),
        _read_labelled(("output_1", "output_2"), "label", (1, 2), "input"),
    ),
    RowFormat(
        "helpsteer", ("prompt", "response_1|response_2", "preference_strength"), _read_helpsteer
    ),
    RowFormat("stack-exchange", ("question", "response_j|response_k"), _read_stack_exchange),
    RowFormat(
        "fine-grained",
        ("question", "prediction 1", "preference"),
        _read_fine_grained,
        known=("passages",),
    ),
    RowFormat("pku", ("prompt", "response_0|response_1", "safer_response_id"), _read_pku),
    RowFormat(
        "shp",
        ("history", "human_ref_A|human_ref_B"),
        _read_labelled(("human_ref_A", "human_ref_B"), "labels", (1, 0), "history"),
        known=("score_A", "score_B", "score_ratio"),
    ),
    RowFormat("webgpt", ("question", "answer_0|answer_1"), _read_webgpt),
    RowFormat("summarize", ("info", "summaries", "choice"), _read_summaries),
    RowFormat("arena", ("conversation_a|conversation_b", "winner"), _read_arena),
)
PREFERENCE_FORMATS = tuple(
    format
    if format.name == "preference"
    else replace(format, convert=drop_by_score(format.convert))
    for format in _READERS
)
