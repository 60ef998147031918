"""Importers of public instruction and dialogue data (§3.1) into `records.Dialog`.

A row whose roles do not alternate is an error that names file, line and turn; a well-formed row that teaches nothing
(an empty answer, an answer marked as bad) is skipped and counted by reason.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from llama2.files import Row
from llama2.records import Dialog, Message, Messages, check_roles, parse
from llama2.tables import Format, Malformed, Skip, convert
from llama2.tally import Tally
from llama2.transcripts import join, messages, prompt


def import_dialogs(path: str | os.PathLike[str], format: str = "auto", name: str = "", tally: Tally | None = None,
                   malformed: Malformed = "stop") -> Iterator[Dialog]:
    """The dialogues in a file, a directory of files or a zip archive.

    format: one of `DIALOG_FORMATS`, or "auto": recognised from the first record of each file.
    name: the set, kept as `metadata["source"]`; "" takes the name of the file.
    tally: counts rows read, records kept and skipped by reason.
    """
    tally = Tally() if tally is None else tally
    for row, dialog in convert(path, DIALOG_FORMATS, format, tally, malformed):
        if not all(message.content for message in dialog.messages):
            tally.skipped["empty answer" if not dialog.messages[-1].content else "empty turn"] += 1
            continue
        tally.kept += 1
        yield dialog if "source" in dialog.metadata else replace(
            dialog, metadata={**dialog.metadata, "source": name or row.name})


def _dialog(turns: Messages, category: str = "") -> Dialog:
    return Dialog(turns, metadata={"category": category} if category else {})


def _single(said: str, answer: str, category: str = "") -> Dialog:
    return _dialog((Message("user", said), Message("assistant", answer)), category)


def _ours(row: Row) -> Iterator[Dialog]:
    yield parse(Dialog, json.dumps(row.value), row.where)


def _is_ours(value: Any) -> bool:
    turns = value.get("messages")
    return value.keys() <= {"messages", "train", "metadata"} and isinstance(turns, list) and all(
        isinstance(item, dict) and item.keys() == {"role", "content"} for item in turns)


def _turns(row: Row) -> Iterator[Dialog]:
    """Lists of turns: ShareGPT, OpenAI's and LMSYS's chat layouts, and KTO sets, whose answers marked bad are left."""
    if str(row.get("label")).lower() == "false":
        raise Skip("the answer is marked as bad")
    given = next(row.get(key) for key in ("conversations", "messages", "conversation") if row.get(key) is not None)
    turns = messages(row, given, row.text("system", optional=True))
    check_roles(turns, last=turns[-1].role if turns and turns[-1].role != "system" else "assistant")
    if turns[-1].role == "user":
        turns = turns[:-1]
    if len(turns) < 2:
        raise Skip("no answer")
    yield _dialog(turns)


def _alpaca(row: Row) -> Iterator[Dialog]:
    """One instruction, what it is about, and the answer: Alpaca, Dolly."""
    said = join(row.text("instruction"), row.text("input", "context", optional=True))
    system = row.text("system", optional=True)
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(past, list) and len(past) == 2 for past in history):
        raise row.error("'history' must be a list of pairs of question and answer")
    past = [(Message("user", str(question)), Message("assistant", str(answer))) for question, answer in history]
    turns = (*((Message("system", system),) if system else ()), *(turn for both in past for turn in both),
             Message("user", said), Message("assistant", row.text("output", "response")))
    yield _dialog(turns, row.text("category", optional=True))


def _self_instruct(row: Row) -> Iterator[Dialog]:
    instances = row.get("instances")
    if not isinstance(instances, list):
        raise row.error("'instances' must be a list")
    for instance in instances:
        inner = Row(instance, row.where, row.name)
        yield _single(join(row.text("instruction"), inner.text("input", optional=True)), inner.text("output"))


def _question_answer(row: Row) -> Iterator[Dialog]:
    """A prompt and its answer, as texts. Answers that carry the label "harmful" are left out."""
    if str(row.get("harmful")) == "1":
        raise Skip("the answer is marked as harmful")
    turns = prompt(row.text("prompt", "question"))
    yield _dialog((*turns, Message("assistant", row.text("response", "answer", "completion"))))


def _chain_of_thought(row: Row) -> Iterator[Dialog]:
    """FLAN's tables: question, answer, rationale; the answer is given after the rationale."""
    if len(row.value) != 3:
        raise row.error(f"three cells are expected (question, answer, rationale), found {len(row.value)}")
    question, answer, rationale = (cell.replace("\\n", "\n").strip() for cell in row.value)
    yield _single(question, f"{rationale} The answer is {answer.removesuffix('.')}.".strip())


def _tree(row: Row) -> Iterator[Dialog]:
    """OpenAssistant's conversation trees: the way down along the answers ranked best."""
    node, turns = row.get("prompt"), list[dict[str, Any]]()
    while isinstance(node, dict):
        turns.append({"role": node.get("role"), "content": node.get("text")})
        replies = node.get("replies") or []
        node = min(replies, key=lambda reply: _rank(reply.get("rank")), default=None)
    read = messages(row, turns)
    if read and read[-1].role == "user":
        read = read[:-1]
    if not read:
        raise Skip("no answer")
    yield _dialog(read)


def _rank(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else float("inf")


DIALOG_FORMATS: tuple[Format[Dialog], ...] = (
    Format("dialog", ("messages",), _ours, _is_ours),
    Format("turns", ("conversations|messages|conversation",), _turns),
    Format("open-assistant", ("message_tree_id", "prompt"), _tree),
    Format("self-instruct", ("instruction", "instances"), _self_instruct),
    Format("alpaca", ("instruction", "output|response"), _alpaca),
    Format("question-answer", ("prompt|question", "response|answer|completion"), _question_answer),
    Format("chain-of-thought", (), _chain_of_thought, lambda value: isinstance(value, list) and len(value) == 3),
)
