"""Importers of public instruction and dialogue data (§3.1) into `records.Dialog`.

A row whose roles do not alternate is an error that names file, line and turn; a well-formed row
that teaches nothing (an empty answer, an answer marked as bad, turns that use tools) is skipped and
counted by reason. Marks and loss flags are the business of `marks`, and hold for every format
alike.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from llama2.importers import marks
from llama2.importers.columns import is_filled
from llama2.importers.questions import (
    INSTRUCTIONS,
    complete,
    read_category,
    read_question,
    read_system,
)
from llama2.importers.tables import AUTO, ReadOptions, RowFormat, SkippedRow, read_records
from llama2.importers.turns import (
    is_own,
    join,
    read_conversation,
    read_own,
    read_turns,
    unwrap,
)
from llama2.reading.files import Row, tidy
from llama2.records import Dialog, Message, Messages, check_roles
from llama2.tally import Tally

QUESTION_KEYS = "prompt|question|Question|query|problem|input"
ANSWERS = (
    "response",
    "solution",
    "answer",
    "completion",
    "Answer",
    "Response",
    "answers",
    "output",
)


def import_dialogs(
    path: str | os.PathLike[str],
    options: ReadOptions = AUTO,
    name: str = "",
    tally: Tally | None = None,
) -> Iterator[Dialog]:
    """The dialogues in a file, a directory of files or a zip archive.

    options: the format, one of `DIALOG_FORMATS` or "auto", and what becomes of malformed rows.
    name: the set, kept as `metadata["source"]`; "" takes the name of the file.
    tally: counts rows read, records kept and skipped by reason.
    """
    tally = Tally() if tally is None else tally
    for row, dialog in read_records(path, DIALOG_FORMATS, options, tally):
        if not all(message.content.strip() for message in dialog.messages):
            tally.skip("empty turn" if dialog.messages[-1].content.strip() else "empty answer")
            continue

        tally.kept += 1
        source = dialog.metadata.get("source", name or row.name)
        yield replace(dialog, metadata=dialog.metadata | {"source": source})


def _make_dialog(turns: Messages, category: str = "") -> Dialog:
    return Dialog(turns, metadata={"category": category} if category else {})


def _make_single(question: str, answer: str, category: str = "") -> Dialog:
    return _make_dialog((Message("user", question), Message("assistant", answer)), category)


def _read_lists(row: Row) -> Iterator[Dialog | SkippedRow]:
    """Lists of turns: ShareGPT, and the chat layouts of OpenAI, axolotl, mistral-finetune, LMSYS
    and KTO sets."""
    values = {key: row.get(key) for key in ("conversations", "messages", "conversation")}
    given = [key for key, value in values.items() if is_filled(value)]
    read = [read_conversation(row, values[key], read_system(row)) for key in given]
    if any(other != read[0] for other in read):
        raise row.error(f"{' and '.join(map(repr, given))} differ", "keep one of them")

    turns, flags = read[0] if read else ((), ())
    roles = [message.role for message in turns]
    if {*roles} <= {"system"}:
        raise SkippedRow("no turns")

    check_roles(turns, last=roles[-1] if roles[-1] != "system" else "assistant")
    if "assistant" not in roles:
        raise SkippedRow("no answer")

    turns = turns[:-1] if roles[-1] == "user" else turns
    beside = row.value.keys() - {"messages", "train", "metadata"}
    metadata = {} if beside else row.get("metadata")
    metadata = metadata if isinstance(metadata, dict) else {}
    yield Dialog(turns, "all" if all(flags) else flags, metadata)


def _read_alpaca(row: Row) -> Iterator[Dialog]:
    """One instruction, what it is about, and the answer: Alpaca, Dolly."""
    turns: list[Message] = []
    if system := read_system(row):
        turns.append(Message("system", system))

    for question, answer in _read_history(row):
        turns += [Message("user", tidy(question)), Message("assistant", tidy(answer))]

    question = complete(row, unwrap(row.text(*INSTRUCTIONS)), True)
    turns += [Message("user", question), Message("assistant", row.text("output", "response"))]
    yield _make_dialog(tuple(turns), read_category(row))


def _read_history(row: Row) -> list[Any]:
    """Return the earlier turns, as pairs of texts."""
    history = row.get("history") or []
    pairs = history if isinstance(history, list) else [None]
    for pair in pairs:
        if not isinstance(pair, list) or [type(text) for text in pair] != [str, str]:
            raise row.error("'history' must be a list of pairs of question and answer")

    return pairs


def _read_self_instruct(row: Row) -> Iterator[Dialog]:
    instances = row.get("instances")
    if not isinstance(instances, list):
        raise row.error("'instances' must be a list")

    for instance in instances:
        part = row.part(instance)
        question = join(row.text("instruction"), part.text("input", optional=True))
        yield _make_single(question, part.text("output"))


def _read_question_answer(row: Row) -> Iterator[Dialog]:
    """A question and its answer, as texts or as lists of turns (TRL): the answer may go on for
    several turns."""
    turns = read_question(row)
    given = {key: row.get(key) for key in ANSWERS}
    key = next((key for key in ANSWERS if is_filled(given[key]) or given[key] is False), "")
    if not key:
        raise SkippedRow("empty answer")

    answer = given[key]
    # SQuAD: all ways to say it; the first is as good as any
    if key == "answers" and isinstance(answer, dict):
        answer = row.part(answer).get("text")
    if key == "answers" and isinstance(answer, list) and {*map(type, answer)} <= {str}:
        answer = answer[0] if answer else ""

    if not isinstance(answer, (list, dict)):
        text = tidy(answer) if isinstance(answer, str) else row.text(key)
        yield _make_dialog((*turns, Message("assistant", text)), read_category(row))
        return

    answers = [answer] if isinstance(answer, dict) else answer
    if not all(isinstance(item, dict) for item in answers):
        raise row.error(f"'{key}' must be text or a list of turns, it is {type(answer).__name__}")

    messages, flags = read_conversation(row, answers)
    earlier = sum(message.role == "assistant" for message in turns)
    mask = (False,) * earlier + flags  # what stands in the prompt is not learnt
    yield Dialog((*turns, *messages), "all" if all(mask) else mask)


def _read_chain_of_thought(row: Row) -> Iterator[Dialog]:
    """FLAN's tables: question, answer, rationale; the answer is given after the rationale."""
    if len(row.value) != 3 or not all(isinstance(cell, str) for cell in row.value):
        raise row.error("three cells are expected: question, answer, rationale")

    question, answer, rationale = (tidy(cell.replace("\\n", "\n")) for cell in row.value)
    if not answer or not rationale:
        raise SkippedRow("empty answer")

    yield _make_single(question, f"{rationale} The answer is {answer.removesuffix('.')}.")


def _read_xstest(row: Row) -> Iterator[Dialog]:
    """Answers to XSTest with their verdicts: an unsafe prompt is to be refused, one that only looks
    unsafe is not."""
    wanted = "2_full_refusal" if row.text("type").startswith("contrast") else "1_full_compliance"
    if row.text("final_label") != wanted:
        raise SkippedRow("the answer is marked as bad")

    yield _make_single(row.text("prompt"), row.text("completion"), row.text("type"))


def _read_tree(row: Row) -> Iterator[Dialog]:
    """OpenAssistant's conversation trees: the way down along the answers ranked best."""
    node, written = row.get("prompt"), list[dict[str, Any]]()
    while isinstance(node, dict):
        written.append({"role": node.get("role"), "content": node.get("text")})
        replies = node.get("replies") or []
        if not isinstance(replies, list) or not all(isinstance(reply, dict) for reply in replies):
            raise row.error("'replies' must be a list of mappings")

        there = [reply for reply in replies if not reply.get("deleted")]
        node = min(there, key=lambda reply: _rank(reply.get("rank")), default=None)

    turns = read_turns(row, written)
    if turns and turns[-1].role == "user":
        turns = turns[:-1]
    if not turns:
        raise SkippedRow("no answer")

    yield _make_dialog(turns)


def _rank(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else float("inf")


_OWN = {"metadata": dict, "train": (str, list)}
_READERS: tuple[RowFormat[Dialog], ...] = (
    # rows with keys of ours beside `messages`; "turns" reads all others, and these too
    RowFormat("dialog", ("messages",), read_own(Dialog), lambda row: is_own(row, _OWN)),
    RowFormat("turns", ("conversations|messages|conversation",), _read_lists, known=("text",)),
    RowFormat("open-assistant", ("message_tree_id", "prompt"), _read_tree),
    RowFormat("self-instruct", ("instruction", "instances"), _read_self_instruct),
    RowFormat("xstest-answers", ("prompt", "type", "completion", "final_label"), _read_xstest),
    RowFormat(
        "alpaca", ("instruction|Instruction", "output|response"), _read_alpaca, known=("text",)
    ),
    RowFormat("question-answer", (QUESTION_KEYS, "|".join(ANSWERS)), _read_question_answer),
    RowFormat("chain-of-thought", (), _read_chain_of_thought, on_request=True, of=list),
)
PROMPTING: tuple[RowFormat[Dialog], ...] = tuple(
    format for format in _READERS if format.name not in ("question-answer", "xstest-answers")
)
"""the formats whose rows are prompts too, whatever their answers are worth"""
DIALOG_FORMATS: tuple[RowFormat[Dialog], ...] = tuple(
    replace(format, convert=marks.mask_unlearnt(format.convert)) for format in _READERS
)
