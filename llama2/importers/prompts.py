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
from typing import Any, Literal

from llama2.hashing import hash_parts
from llama2.importers import marks
from llama2.importers.dialogs import ANSWERS, ASKED, QUESTION_KEYS
from llama2.importers.questions import QUESTIONS, asked, category_of, system
from llama2.importers.tables import AUTO, Format, Reading, Skip, convert
from llama2.importers.transcripts import messages, prompt
from llama2.reading.files import Row
from llama2.records import Dialog, Message, Messages, Prompt, check_roles, parse
from llama2.tally import Tally

Family = Literal["", "unsafe", "borderline"]


def import_prompts(
    path: str | os.PathLike[str],
    how: Reading = AUTO,
    safety: bool | None = None,
    family: Family = "",
    name: str = "",
    tally: Tally | None = None,
) -> Iterator[Prompt]:
    """The prompts in a file, a directory of files or a zip archive.

    how: the format, one of `PROMPT_FORMATS` or "auto", and what becomes of malformed rows.
    safety: the safety tag of all prompts; None: true for the unsafe and the borderline, else false.
    family: the family of all prompts of whose set it is not known.
    name: the set, kept as `metadata["source"]`; "" takes the name of the file.
    tally: counts rows read, records kept and skipped by reason.
    """
    tally = Tally() if tally is None else tally
    for row, item in convert(path, PROMPT_FORMATS, replace(how, worth=False), tally):
        if not all(message.content.strip() for message in item.messages):
            tally.skip("empty turn")
            continue

        tally.kept += 1
        source = str(item.metadata.get("source", name or row.name))
        if item.metadata.get("family", family):
            tally.note("family", str(item.metadata.get("family", family)))

        metadata = ({"family": family} if family else {}) | item.metadata | {"source": source}
        yield replace(
            item,
            id=item.id or prompt_id(item.messages, source),
            safety=item.safety or bool(family) if safety is None else safety,
            metadata=metadata,
        )


def prompt_id(turns: Messages, source: str) -> str:
    """An id that depends on the set and on what is said."""
    said = json.dumps([(m.role, m.content) for m in turns])
    return f"{source}:{hash_parts(said):016x}"


def _prompt(turns: Messages, family: Family = "", **metadata: str) -> Prompt:
    kept = {key: value for key, value in {"family": family, **metadata}.items() if value}
    return Prompt(turns, safety=bool(family), metadata=kept)


def _ours(row: Row) -> Iterator[Prompt]:
    item = parse(Prompt, json.dumps(row.whole()), row.where)
    yield replace(
        item,
        messages=tuple(Message(m.role, m.content.replace("\r\n", "\n")) for m in item.messages),
    )


def _is_ours(row: Row) -> bool:
    """Whether a row has keys of ours, beside `messages`; `chat` reads all others."""
    turns, keys = row.get("messages"), row.value.keys()
    own = isinstance(row.get("metadata"), dict) or isinstance(row.get("safety"), bool)
    return (
        own
        and keys <= {"messages", "id", "safety", "metadata"}
        and isinstance(turns, list)
        and all(isinstance(item, dict) and item.keys() == {"role", "content"} for item in turns)
        and _waits(row)
    )


def _column(key: str, family: Family, *categories: str) -> Callable[[Row], Iterator[Prompt]]:
    """A table with the prompt in one column and, at most, its category in another."""

    def read(row: Row) -> Iterator[Prompt]:
        category = row.text(*categories, optional=True) if categories else ""
        yield _prompt(prompt(row.text(key)), family, category=category)

    return read


def _xstest(row: Row) -> Iterator[Prompt]:
    """XSTest: safe prompts that look unsafe, and their unsafe contrasts. Early files tell them
    apart by type only."""
    kind = row.text("type")
    stated = row.text("label", optional=True) or (
        "unsafe" if kind.startswith("contrast") else "safe"
    )
    if stated not in ("safe", "unsafe"):
        raise row.error(f"'label' must be safe or unsafe, it is '{stated}'")

    yield _prompt(
        prompt(row.text("prompt")), "unsafe" if stated == "unsafe" else "borderline", category=kind
    )


def _list(row: Row) -> Iterator[Prompt]:
    """One mapping with all prompts: `instructions` and, beside them, `tags`."""
    said, tags = row.get("instructions"), row.get("tags") or []
    if not isinstance(said, list) or not all(isinstance(item, str) for item in said):
        raise row.error("'instructions' must be a list of texts")
    if not isinstance(tags, list):
        raise row.error("'tags' must be a list")

    for index, item in enumerate(said):
        yield _prompt(prompt(item), category=str(tags[index]) if index < len(tags) else "")


def _turns(row: Row) -> Iterator[Prompt]:
    """MT-Bench: questions asked in turn; the first is the prompt, the others travel along."""
    turns = row.get("turns")
    if not isinstance(turns, list) or not turns or not all(isinstance(item, str) for item in turns):
        raise row.error("'turns' must be a list of texts")

    item = _prompt(prompt(turns[0]), category=category_of(row))
    yield replace(item, metadata={**item.metadata, "follow_ups": turns[1:]}) if turns[1:] else item


def _plain(row: Row) -> Iterator[Prompt]:
    """A text in the column that is called after what it is, with what it is about."""
    turns = asked(row)
    check_roles(turns, last="user")
    yield _tagged(row, _prompt(turns, category=category_of(row, "category", "Category", "Skill")))


def _alone(row: Row) -> Iterator[Prompt]:
    """A prompt without an answer: what marks there are speak of the prompt."""
    for item in _plain(row):
        family = item.metadata.get("family", "unsafe") if marks.marked_unsafe(row) else ""
        yield (
            replace(item, safety=True, metadata={**item.metadata, "family": family})
            if family
            else item
        )


def _tagged(row: Row, item: Prompt) -> Prompt:
    """A prompt with the safety tag and the family that its row states, as our own records do."""
    stated, inner = marks.is_yes(row.get("safety")), row.get("metadata")
    families = {
        family
        for family in (row.get("family"), inner.get("family") if isinstance(inner, dict) else None)
        if family in ("unsafe", "borderline")
    }
    row.asked.difference_update(
        [
            "metadata",
            *(["safety"] if stated is None else []),
            *([] if row.get("family") in ("unsafe", "borderline") else ["family"]),
        ]
    )

    if len(families) > 1:
        raise row.error("'family' and 'metadata.family' differ", "keep one of them")

    family = {"family": families.pop()} if families else {}
    return replace(
        item,
        safety=bool(stated or (family and stated is None)),
        metadata={**item.metadata, **family},
    )


def _lines(row: Row) -> Iterator[Prompt]:
    yield _prompt(prompt(row.value))


def _toxigen(row: Row) -> Iterator[Prompt]:
    """ToxiGen's prompts: lists of statements to go on with, their line ends written as the two
    characters \\n."""
    family: Family = "unsafe" if row.name.startswith("hate_") else ""
    yield _prompt((Message("user", row.value.replace("\\n", "\n").strip()),), family)


def _is_toxigen(row: Row) -> bool:
    return row.value.startswith("- ") and "\\n-" in row.value


def _nested(row: Row) -> Iterator[Prompt]:
    """Mappings of mappings of lists of prompts (by topic, by group and entity): the way down is the
    category."""
    yield from _walk(row, row.whole(), ())


def _walk(row: Row, value: Any, way: tuple[str, ...]) -> Iterator[Prompt]:
    if isinstance(value, str):
        yield _prompt(prompt(value), category="/".join(way))
    elif isinstance(value, (list, dict)):
        for key, item in (
            value.items() if isinstance(value, dict) else (("", item) for item in value)
        ):
            yield from _walk(row, item, (*way, key) if key else way)
    else:
        raise row.error(f"texts are expected below '{'/'.join(way)}', found {type(value).__name__}")


def _is_nested(row: Row) -> bool:
    return bool(row.value) and all(map(_holds_texts, row.value.values()))


def _holds_texts(value: Any) -> bool:
    """Whether a value is a list of texts, or a mapping of such, at any depth."""
    if isinstance(value, dict):
        return bool(value) and all(map(_holds_texts, value.values()))

    return isinstance(value, list) and bool(value) and all(isinstance(item, str) for item in value)


def _is_catqa(row: Row) -> bool:
    """CatQA, which only its name tells from other questions by topic."""
    return _is_nested(row) and row.name.lower().replace("_", "").startswith(
        ("catqa", "categoricalharmfulqa")
    )


def _catqa(row: Row) -> Iterator[Prompt]:
    for item in _nested(row):
        yield replace(item, safety=True, metadata={"family": "unsafe", **item.metadata})


def _from_dialog(source: Format[Dialog]) -> Format[Prompt]:
    """A dialogue as the prompt for its last answer."""

    def read(row: Row) -> Iterator[Prompt | Skip]:
        for dialog in source.convert(row):
            yield (
                dialog
                if isinstance(dialog, Skip)
                else _prompt(
                    dialog.messages[:-1],
                    **(
                        {"category": dialog.metadata["category"]}
                        if "category" in dialog.metadata
                        else {}
                    ),
                )
            )

    return Format(
        source.name, source.keys, read, source.test, source.known, source.on_request, source.of
    )


def _chat(row: Row) -> Iterator[Prompt]:
    """A list of turns that waits for an answer."""
    turns = messages(row, row.get("messages"), system(row))
    check_roles(turns, last="user")
    yield _tagged(row, _prompt(turns, category=category_of(row)))


def _waits(row: Row) -> bool:
    turns = row.get("messages")
    return (
        isinstance(turns, list)
        and bool(turns)
        and isinstance(turns[-1], dict)
        and str(turns[-1].get("role")).lower() in ("user", "human")
    )


_REVIEWED = ("question", "response", "harmful", "action")
PROMPT_FORMATS: tuple[Format[Prompt], ...] = (
    Format("prompt", ("messages",), _ours, _is_ours),
    Format("chat", ("messages",), _chat, _waits),
    Format("xstest", ("prompt", "type", "focus|label|final_label"), _xstest),
    Format("advbench", ("goal", "target"), _column("goal", "unsafe")),
    Format(
        "simple-safety-tests", ("prompts_final",), _column("prompts_final", "unsafe", "harm_area")
    ),
    Format("do-not-answer", ("question", "risk_area"), _column("question", "unsafe", "risk_area")),
    Format("do-not-answer-review", _REVIEWED, _column("question", "unsafe")),
    Format(
        "instructions",
        ("instructions",),
        _list,
        lambda row: isinstance(row.get("instructions"), list),
    ),
    Format("questions", ("turns",), _turns),
    *(_from_dialog(source) for source in ASKED),
    Format("question-answer", (QUESTION_KEYS, "|".join(ANSWERS)), _plain),
    Format("plain", ("|".join(QUESTIONS),), _alone),
    Format("toxigen", (), _toxigen, _is_toxigen, of=str),
    Format("lines", (), _lines, of=str),
    Format("catqa", (), _catqa, _is_catqa),
    Format("nested", (), _nested, _is_nested),
)
