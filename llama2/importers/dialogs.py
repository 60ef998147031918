"""Importers of public instruction and dialogue data (§3.1) into `records.Dialog`.

A row whose roles do not alternate is an error that names file, line and turn; a well-formed row
that teaches nothing (an empty answer, an answer marked as bad, turns that use tools) is skipped and
counted by reason. Marks and loss flags are the business of `marks`, and hold for every format
alike.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from llama2.importers import marks
from llama2.importers.columns import is_filled
from llama2.importers.questions import INSTRUCTIONS, asked, category_of, complete, system
from llama2.importers.tables import AUTO, Format, Reading, Skip, convert
from llama2.importers.transcripts import conversation, join, messages, unwrapped
from llama2.reading.files import Row, tidy
from llama2.records import Dialog, Message, Messages, check_roles, parse
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
    path: str | os.PathLike[str], how: Reading = AUTO, name: str = "", tally: Tally | None = None
) -> Iterator[Dialog]:
    """The dialogues in a file, a directory of files or a zip archive.

    how: the format, one of `DIALOG_FORMATS` or "auto", and what becomes of malformed rows.
    name: the set, kept as `metadata["source"]`; "" takes the name of the file.
    tally: counts rows read, records kept and skipped by reason.
    """
    tally = Tally() if tally is None else tally
    for row, dialog in convert(path, DIALOG_FORMATS, how, tally):
        if not all(message.content.strip() for message in dialog.messages):
            tally.skip("empty turn" if dialog.messages[-1].content.strip() else "empty answer")
            continue

        tally.kept += 1
        yield (
            dialog
            if "source" in dialog.metadata
            else replace(dialog, metadata={**dialog.metadata, "source": name or row.name})
        )


def _dialog(turns: Messages, category: str = "") -> Dialog:
    return Dialog(turns, metadata={"category": category} if category else {})


def _single(said: str, answer: str, category: str = "") -> Dialog:
    return _dialog((Message("user", said), Message("assistant", answer)), category)


def _ours(row: Row) -> Iterator[Dialog]:
    dialog = parse(Dialog, json.dumps(row.whole()), row.where)
    yield replace(
        dialog,
        messages=tuple(Message(m.role, m.content.replace("\r\n", "\n")) for m in dialog.messages),
    )


def _is_ours(row: Row) -> bool:
    """Whether a row has keys of ours, beside `messages`; `turns` reads all others, and these
    too."""
    turns, keys = row.get("messages"), row.value.keys()
    own = isinstance(row.get("metadata"), dict) or isinstance(row.get("train"), (str, list))
    return (
        own
        and keys <= {"messages", "train", "metadata"}
        and isinstance(turns, list)
        and all(isinstance(item, dict) and item.keys() == {"role", "content"} for item in turns)
    )


def _turns(row: Row) -> Iterator[Dialog | Skip]:
    """Lists of turns: ShareGPT, and the chat layouts of OpenAI, axolotl, mistral-finetune, LMSYS
    and KTO sets."""
    given = {
        key: value
        for key in ("conversations", "messages", "conversation")
        if is_filled(value := row.get(key))
    }
    read = [conversation(row, value, system(row)) for value in given.values()] or [((), ())]
    if any(other != read[0] for other in read):
        raise row.error(f"{' and '.join(map(repr, given))} differ", "keep one of them")

    turns, learnt = read[0]
    if not any(message.role != "system" for message in turns):
        raise Skip("no turns")

    check_roles(turns, last=turns[-1].role if turns[-1].role != "system" else "assistant")
    if turns[-1].role == "user":
        turns = turns[:-1]

    if not any(message.role == "assistant" for message in turns):
        raise Skip("no answer")

    ours = row.value.keys() <= {"messages", "train", "metadata"} and isinstance(
        row.get("metadata"), dict
    )
    yield Dialog(turns, "all" if all(learnt) else learnt, row.get("metadata") if ours else {})


def _alpaca(row: Row) -> Iterator[Dialog]:
    """One instruction, what it is about, and the answer: Alpaca, Dolly."""
    said = system(row)
    past = [
        (Message("user", tidy(question)), Message("assistant", tidy(answer)))
        for question, answer in _history(row)
    ]
    turns = (
        *((Message("system", said),) if said else ()),
        *(turn for both in past for turn in both),
        Message("user", complete(row, unwrapped(row.text(*INSTRUCTIONS)), True)),
        Message("assistant", row.text("output", "response")),
    )
    yield _dialog(turns, category_of(row))


def _history(row: Row) -> list[list[str]]:
    """The earlier turns, as pairs of texts."""
    history = row.get("history") or []
    if not isinstance(history, list) or not all(
        isinstance(past, list) and len(past) == 2 and all(isinstance(said, str) for said in past)
        for past in history
    ):
        raise row.error("'history' must be a list of pairs of question and answer")

    return history


def _self_instruct(row: Row) -> Iterator[Dialog]:
    instances = row.get("instances")
    if not isinstance(instances, list):
        raise row.error("'instances' must be a list")

    for instance in instances:
        inner = row.part(instance)
        yield _single(
            join(row.text("instruction"), inner.text("input", optional=True)), inner.text("output")
        )


def _question_answer(row: Row) -> Iterator[Dialog]:
    """A question and its answer, as texts or as lists of turns (TRL): the answer may go on for
    several turns."""
    turns = asked(row)
    given = {key: row.get(key) for key in ANSWERS}
    key = next((key for key in ANSWERS if is_filled(given[key]) or given[key] is False), "")

    if not key:
        raise Skip("empty answer")

    answer = given[key]
    # SQuAD: all ways to say it; the first is as good as any
    if isinstance(answer, dict) and key == "answers":
        answer = row.part(answer).get("text")

    if (
        key == "answers"
        and isinstance(answer, list)
        and all(isinstance(text, str) for text in answer)
    ):
        answer = answer[0] if answer else ""

    if isinstance(answer, (list, dict)) and not _has_turns(answer):
        raise row.error(f"'{key}' must be text or a list of turns, it is {type(answer).__name__}")

    if not isinstance(answer, (list, dict)):
        said = tidy(answer) if isinstance(answer, str) else row.text(key)
        yield _dialog((*turns, Message("assistant", said)), category_of(row))
        return

    answers, learnt = conversation(row, [answer] if isinstance(answer, dict) else answer)
    earlier = sum(message.role == "assistant" for message in turns)
    mask = (False,) * earlier + learnt  # what stands in the prompt is not learnt
    yield Dialog((*turns, *answers), "all" if all(mask) else mask)


def _has_turns(answer: Any) -> bool:
    return all(
        isinstance(item, dict) for item in (answer if isinstance(answer, list) else [answer])
    )


def _chain_of_thought(row: Row) -> Iterator[Dialog]:
    """FLAN's tables: question, answer, rationale; the answer is given after the rationale."""
    if len(row.value) != 3 or not all(isinstance(cell, str) for cell in row.value):
        raise row.error("three cells are expected: question, answer, rationale")

    question, answer, rationale = (tidy(cell.replace("\\n", "\n")) for cell in row.value)
    if not answer or not rationale:
        raise Skip("empty answer")

    yield _single(question, f"{rationale} The answer is {answer.removesuffix('.')}.")


def _xstest(row: Row) -> Iterator[Dialog]:
    """Answers to XSTest with their verdicts: an unsafe prompt is to be refused, one that only looks
    unsafe is not."""
    wanted = "2_full_refusal" if row.text("type").startswith("contrast") else "1_full_compliance"
    if row.text("final_label") != wanted:
        raise Skip("the answer is marked as bad")

    yield _single(row.text("prompt"), row.text("completion"), row.text("type"))


def _tree(row: Row) -> Iterator[Dialog]:
    """OpenAssistant's conversation trees: the way down along the answers ranked best."""
    node, turns = row.get("prompt"), list[dict[str, Any]]()
    while isinstance(node, dict):
        turns.append({"role": node.get("role"), "content": node.get("text")})
        replies = node.get("replies") or []
        if not isinstance(replies, list) or not all(isinstance(reply, dict) for reply in replies):
            raise row.error("'replies' must be a list of mappings")

        node = min(
            (reply for reply in replies if not reply.get("deleted")),
            key=lambda reply: _rank(reply.get("rank")),
            default=None,
        )

    read = messages(row, turns)
    if read and read[-1].role == "user":
        read = read[:-1]

    if not read:
        raise Skip("no answer")

    yield _dialog(read)


def _rank(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else float("inf")


_READERS: tuple[Format[Dialog], ...] = (
    Format("dialog", ("messages",), _ours, _is_ours),
    Format("turns", ("conversations|messages|conversation",), _turns, known=("text",)),
    Format("open-assistant", ("message_tree_id", "prompt"), _tree),
    Format("self-instruct", ("instruction", "instances"), _self_instruct),
    Format("xstest-answers", ("prompt", "type", "completion", "final_label"), _xstest),
    Format("alpaca", ("instruction|Instruction", "output|response"), _alpaca, known=("text",)),
    Format("question-answer", (QUESTION_KEYS, "|".join(ANSWERS)), _question_answer),
    Format("chain-of-thought", (), _chain_of_thought, on_request=True, of=list),
)
ASKED: tuple[Format[Dialog], ...] = tuple(
    f for f in _READERS if f.name not in ("question-answer", "xstest-answers")
)
"""the formats whose rows are prompts too, whatever their answers are worth"""
DIALOG_FORMATS: tuple[Format[Dialog], ...] = tuple(
    replace(f, convert=marks.learnt(f.convert)) for f in _READERS
)
