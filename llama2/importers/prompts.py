"""Importers of prompts (§3.2.3, §4.2.4) into `records.Prompt`: questions, safety sets, dialogues
cut before an answer.

`metadata["family"]` is "unsafe" for prompts no one should comply with and "borderline" for prompts
that look unsafe and are not, where a set tells; both carry `Prompt.safety`, the tag is_safety(p) of
§3.2.3.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain, repeat
from typing import Any, Literal

from llama2.hashing import hash_parts
from llama2.importers import marks
from llama2.importers.dialogs import ANSWERS, PROMPTING, QUESTION_KEYS
from llama2.importers.questions import QUESTIONS, read_category, read_question, read_system
from llama2.importers.tables import AUTO, ReadOptions, RowFormat, SkippedRow, read_records
from llama2.importers.turns import is_own, read_own, read_prompt, read_turns
from llama2.reading.files import Row
from llama2.records import Dialog, Message, Messages, Prompt, check_roles
from llama2.tally import Tally

Family = Literal["", "unsafe", "borderline"]
_FAMILIES = ("unsafe", "borderline")


def import_prompts(
    path: str | os.PathLike[str],
    options: ReadOptions = AUTO,
    safety: bool | None = None,
    family: Family = "",
    name: str = "",
    tally: Tally | None = None,
) -> Iterator[Prompt]:
    """The prompts in a file, a directory of files or a zip archive.

    options: the format, one of `PROMPT_FORMATS` or "auto", and what becomes of malformed rows.
    safety: the safety tag of all prompts; None: true for the unsafe and the borderline, else false.
    family: the family of all prompts of whose set it is not known.
    name: the set, kept as `metadata["source"]`; "" takes the name of the file.
    tally: counts rows read, records kept and skipped by reason.
    """
    tally = Tally() if tally is None else tally
    defaults = {"family": family} if family else {}
    for row, prompt in read_records(path, PROMPT_FORMATS, replace(options, worth=False), tally):
        if not prompt.asks:
            tally.skip("empty turn")
            continue

        tally.kept += 1
        source = str(prompt.metadata.get("source", name or row.name))
        metadata = defaults | prompt.metadata | {"source": source}
        if metadata.get("family"):
            tally.note("family", str(metadata["family"]))

        yield replace(
            prompt,
            id=prompt.id or make_prompt_id(prompt.messages, source),
            safety=prompt.safety or bool(family) if safety is None else safety,
            metadata=metadata,
        )


def make_prompt_id(turns: Messages, source: str) -> str:
    """Return an id that depends on the set and on what is said."""
    text = json.dumps([(message.role, message.content) for message in turns])
    return f"{source}:{hash_parts(text):016x}"


def _make_prompt(turns: Messages, family: Family = "", category: str = "") -> Prompt:
    metadata = {"family": str(family), "category": category}
    filled = {key: value for key, value in metadata.items() if value}
    return Prompt(turns, safety=bool(family), metadata=filled)


def _read_column(key: str, family: Family, *categories: str) -> Callable[[Row], Iterator[Prompt]]:
    """Return a reader of tables with the prompt in one column and, at most, its category in
    another."""

    def read(row: Row) -> Iterator[Prompt]:
        category = row.text(*categories, optional=True) if categories else ""
        yield _make_prompt(read_prompt(row.text(key)), family, category)

    return read


def _read_xstest(row: Row) -> Iterator[Prompt]:
    """XSTest: safe prompts that look unsafe, and their unsafe contrasts. Early files tell them
    apart by type only."""
    kind = row.text("type")
    by_type = "unsafe" if kind.startswith("contrast") else "safe"
    label = row.text("label", optional=True) or by_type
    if label not in ("safe", "unsafe"):
        raise row.error(f"'label' must be safe or unsafe, it is '{label}'")

    family: Family = "unsafe" if label == "unsafe" else "borderline"
    yield _make_prompt(read_prompt(row.text("prompt")), family, kind)


def _read_list(row: Row) -> Iterator[Prompt]:
    """One mapping with all prompts: `instructions` and, beside them, `tags`."""
    texts, tags = row.get("instructions"), row.get("tags") or []
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise row.error("'instructions' must be a list of texts")
    if not isinstance(tags, list):
        raise row.error("'tags' must be a list")

    for text, tag in zip(texts, chain(tags, repeat(""))):
        yield _make_prompt(read_prompt(text), category=str(tag))


def _read_questions(row: Row) -> Iterator[Prompt]:
    """MT-Bench: questions asked in turn; the first is the prompt, the others travel along."""
    turns = row.get("turns")
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) for turn in turns):
        raise row.error("'turns' must be a list of texts")

    prompt = _make_prompt(read_prompt(turns[0]), category=read_category(row))
    if turns[1:]:
        prompt.metadata["follow_ups"] = turns[1:]

    yield prompt


def _read_plain(row: Row) -> Iterator[Prompt]:
    """A text in the column that is called after what it is, with what it is about."""
    turns = read_question(row)
    check_roles(turns, last="user")
    category = read_category(row, "category", "Category", "Skill")
    yield _tag(row, _make_prompt(turns, category=category))


def _read_alone(row: Row) -> Iterator[Prompt]:
    """A prompt without an answer: what marks there are speak of the prompt."""
    for prompt in _read_plain(row):
        if marks.is_marked_unsafe(row):
            family = {"family": prompt.metadata.get("family", "unsafe")}
            yield replace(prompt, safety=True, metadata=prompt.metadata | family)
        else:
            yield prompt


def _tag(row: Row, prompt: Prompt) -> Prompt:
    """Return a prompt with the safety tag and the family that its row states, as our own records
    do."""
    safety, inner = marks.parse_yes(row.get("safety")), row.get("metadata")
    stated = [row.get("family"), inner.get("family") if isinstance(inner, dict) else None]
    families = {family for family in stated if family in _FAMILIES}
    row.read.discard("metadata")
    if safety is None:
        row.read.discard("safety")
    if stated[0] not in _FAMILIES:
        row.read.discard("family")
    if len(families) > 1:
        raise row.error("'family' and 'metadata.family' differ", "keep one of them")

    tag = bool(families) if safety is None else safety
    family = {"family": families.pop()} if families else {}
    return replace(prompt, safety=tag, metadata=prompt.metadata | family)


def _read_toxigen(row: Row) -> Iterator[Prompt]:
    """ToxiGen's prompts: lists of statements to go on with, their line ends written as the two
    characters \\n."""
    family: Family = "unsafe" if row.name.startswith("hate_") else ""
    text = row.value.replace("\\n", "\n").strip()
    yield _make_prompt((Message("user", text),), family)


def _read_nested(row: Row) -> Iterator[Prompt]:
    """Mappings of mappings of lists of prompts (by topic, by group and entity): the way down is the
    category."""
    yield from _walk(row, row.read_all(), ())


def _walk(row: Row, value: Any, way: tuple[str, ...]) -> Iterator[Prompt]:
    if isinstance(value, str):
        yield _make_prompt(read_prompt(value), category="/".join(way))
    elif isinstance(value, list):
        for item in value:
            yield from _walk(row, item, way)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _walk(row, item, (*way, key) if key else way)
    else:
        raise row.error(f"texts are expected below '{'/'.join(way)}', found {type(value).__name__}")


def _is_nested(row: Row) -> bool:
    return bool(row.value) and all(map(_holds_texts, row.value.values()))


def _holds_texts(value: Any) -> bool:
    """Return whether a value is a list of texts, or a mapping of such, at any depth."""
    if isinstance(value, dict):
        return bool(value) and all(map(_holds_texts, value.values()))

    return isinstance(value, list) and bool(value) and all(isinstance(item, str) for item in value)


def _is_catqa(row: Row) -> bool:
    """CatQA, which only its name tells from other questions by topic."""
    name = row.name.lower().replace("_", "")
    return _is_nested(row) and name.startswith(("catqa", "categoricalharmfulqa"))


def _read_catqa(row: Row) -> Iterator[Prompt]:
    for prompt in _read_nested(row):
        yield replace(prompt, safety=True, metadata={"family": "unsafe", **prompt.metadata})


def _from_dialog(source: RowFormat[Dialog]) -> RowFormat[Prompt]:
    """Return the format of a dialogue as the prompt for its last answer."""

    def read(row: Row) -> Iterator[Prompt | SkippedRow]:
        for dialog in source.convert(row):
            if isinstance(dialog, Dialog):
                category = dialog.metadata.get("category", "")
                yield _make_prompt(dialog.messages[:-1], category=category)
            else:
                yield dialog

    known, on_request, of = source.known, source.on_request, source.of
    return RowFormat(source.name, source.keys, read, source.test, known, on_request, of)


def _read_chat(row: Row) -> Iterator[Prompt]:
    """A list of turns that waits for an answer."""
    turns = read_turns(row, row.get("messages"), read_system(row))
    check_roles(turns, last="user")
    yield _tag(row, _make_prompt(turns, category=read_category(row)))


def _waits(row: Row) -> bool:
    turns = row.get("messages")
    if not isinstance(turns, list) or not turns or not isinstance(turns[-1], dict):
        return False

    return str(turns[-1].get("role")).lower() in ("user", "human")


_OWN = {"metadata": dict, "safety": bool, "id": ()}
_REVIEWED = ("question", "response", "harmful", "action")
PROMPT_FORMATS: tuple[RowFormat[Prompt], ...] = (
    # rows with keys of ours beside `messages`; "chat" reads all others
    RowFormat(
        "prompt",
        ("messages",),
        read_own(Prompt),
        lambda row: is_own(row, _OWN) and _waits(row),
    ),
    RowFormat("chat", ("messages",), _read_chat, _waits),
    RowFormat("xstest", ("prompt", "type", "focus|label|final_label"), _read_xstest),
    RowFormat("advbench", ("goal", "target"), _read_column("goal", "unsafe")),
    RowFormat(
        "simple-safety-tests",
        ("prompts_final",),
        _read_column("prompts_final", "unsafe", "harm_area"),
    ),
    RowFormat(
        "do-not-answer", ("question", "risk_area"), _read_column("question", "unsafe", "risk_area")
    ),
    RowFormat("do-not-answer-review", _REVIEWED, _read_column("question", "unsafe")),
    RowFormat(
        "instructions",
        ("instructions",),
        _read_list,
        lambda row: isinstance(row.get("instructions"), list),
    ),
    RowFormat("questions", ("turns",), _read_questions),
    *(_from_dialog(source) for source in PROMPTING),
    RowFormat("question-answer", (QUESTION_KEYS, "|".join(ANSWERS)), _read_plain),
    RowFormat("plain", ("|".join(QUESTIONS),), _read_alone),
    RowFormat(
        "toxigen",
        (),
        _read_toxigen,
        lambda row: row.value.startswith("- ") and "\\n-" in row.value,
        of=str,
    ),
    RowFormat("lines", (), lambda row: [_make_prompt(read_prompt(row.value))], of=str),
    RowFormat("catqa", (), _read_catqa, _is_catqa),
    RowFormat("nested", (), _read_nested, _is_nested),
)
