"""The records every stage exchanges, and their JSON Lines files.

One record of each kind serves the whole recipe (see docs/architecture.md): a `Document` is
pretraining text, a `Dialog` is a training conversation, a `Prompt` asks for an answer, a
`Preference` is one human comparison (§3.2.1). They are written as JSON Lines, optionally `.gz` or
`.zst`, and read by `files`.
"""

from __future__ import annotations

import gzip
import json
import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, overload

import pydantic_core
from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config

from llama2 import atomic, json_files
from llama2.errors import UserError, explain_os_errors
from llama2.reading import files
from llama2.reading.files import BadRow, File, read_filled
from llama2.reading.packed import import_zstandard
from llama2.tally import Tally

Role = Literal["system", "user", "assistant"]
Axis = Literal["helpful", "safe"]
Degree = Literal["significantly", "better", "slightly", "negligibly"]
SafetyLabel = Literal["preferred_only", "both", "neither"]
DEGREES: tuple[Degree, ...] = ("significantly", "better", "slightly", "negligibly")
_STRICT = ConfigDict(extra="forbid", strict=True)
Record = TypeVar("Record")


@with_config(_STRICT)
@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str


Messages = tuple[Message, ...]


@with_config(_STRICT)
@dataclass(frozen=True)
class Document:
    """A piece of pretraining text (§2.1)."""

    text: str
    id: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)


Train = Literal["all", "last"] | tuple[bool, ...]


@with_config(_STRICT)
@dataclass(frozen=True)
class Dialog:
    """A conversation to learn from (§3.1). It ends with an assistant turn.

    `train` says which assistant turns carry loss: all of them, the last alone (a sampled answer,
    §3.2.3, §4.2.4; Ghost Attention, §3.3), or those for which a mask, one truth value for each
    assistant turn, says so.
    """

    messages: Messages
    train: Train = "all"
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_roles(self.messages, last="assistant")
        mask_turns(self.messages, self.train)


@with_config(_STRICT)
@dataclass(frozen=True)
class Prompt:
    """A conversation that waits for its next answer. `safety` is the tag is_safety(p) of §3.2.3."""

    messages: Messages
    id: str = ""
    safety: bool = False
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_roles(self.messages, last="user")

    @property
    def asks(self) -> bool:
        """Return whether every turn says something."""
        return all(message.content.strip() for message in self.messages)


@with_config(_STRICT)
@dataclass(frozen=True)
class Response:
    """An answer and where it came from."""

    text: str
    model: str = ""
    temperature: float | None = None


@with_config(_STRICT)
@dataclass(frozen=True)
class Preference:
    """One comparison of two answers, in the order in which they were shown (§3.2.1).

    `safety` is the three-bin safety label: only the preferred answer is safe, both are, or neither
    is.
    """

    id: str
    prompt: Messages
    responses: tuple[Response, Response]
    preferred: Literal[0, 1]
    degree: Degree
    safety: SafetyLabel | None = None
    axis: Axis = "helpful"
    annotator: str = ""
    round: int = 0
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_roles(self.prompt, last="user")

    @property
    def chosen(self) -> Response:
        """The preferred answer."""
        return self.responses[self.preferred]

    @property
    def rejected(self) -> Response:
        """The other answer."""
        return self.responses[1 - self.preferred]

    @property
    def chosen_safe(self) -> bool | None:
        """Return whether the preferred answer is safe, None where nobody said so."""
        return None if self.safety is None else self.safety != "neither"

    @property
    def rejected_safe(self) -> bool | None:
        """Return whether the other answer is safe, None where nobody said so."""
        return None if self.safety is None else self.safety == "both"


@with_config(_STRICT)
@dataclass(frozen=True)
class Pair:
    """Two answers that nobody has judged yet, as they are to be shown; with the blanks filled in, a
    `Preference`."""

    id: str
    prompt: Messages
    responses: tuple[Response, Response]
    preferred: None = None
    degree: None = None
    safety: None = None
    axis: Axis = "helpful"
    annotator: str = ""
    round: int = 0
    metadata: dict[str, Any] = field(default_factory=dict)


def check_roles(messages: Messages, last: Role) -> None:
    """ValueError unless roles alternate user, assistant, ... after an optional system turn, and end
    with `last`."""
    turns = messages[1:] if messages and messages[0].role == "system" else messages
    if not turns:
        raise ValueError("a conversation needs at least one user turn")

    for index, message in enumerate(turns):
        expected = ("user", "assistant")[index % 2]
        if message.role != expected:
            raise ValueError(
                f"roles must alternate user/assistant: turn {index + 1} is '{message.role}', "
                f"expected '{expected}'"
            )

    if turns[-1].role != last:
        raise ValueError(f"the last turn must be '{last}', it is '{turns[-1].role}'")


def mask_turns(messages: Messages, train: Train) -> tuple[bool, ...]:
    """Return for each assistant turn whether it carries loss; ValueError for a mask of another
    length."""
    turns = sum(message.role == "assistant" for message in messages)
    if train == "all":
        return (True,) * turns
    if train == "last":
        return (False,) * (turns - 1) + (True,)
    if len(train) != turns:
        raise ValueError(f"'train' has {len(train)} values for {turns} assistant turns")

    return train


_ADAPTERS: dict[type, TypeAdapter[Any]] = {}


def _adapter(kind: type) -> TypeAdapter[Any]:
    if kind not in _ADAPTERS:
        _ADAPTERS[kind] = TypeAdapter(kind)

    return _ADAPTERS[kind]


def parse(kind: type[Record], row: str | bytes, where: str) -> Record:
    """Return one JSON line as a record of `kind`; `where` (file and line) goes into the error."""
    try:
        record: Record = _adapter(kind).validate_json(row)
        return record
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise UserError(
            ": ".join(filter(None, (where, place, message))),
            f"each line must be one {kind.__name__} record (docs/formats.md)",
        ) from None


def to_json(record: object) -> str:
    """Return a record as one line of JSON."""
    return _adapter(type(record)).dump_json(record).decode()


def read(
    kind: type[Record],
    path: str | os.PathLike[str],
    may_be_empty: bool = False,
    tally: Tally | None = None,
) -> Iterator[Record]:
    """The records at a path (`files`): JSON Lines, and whatever else holds mappings.

    None at all is an error unless `may_be_empty`: a user never means an empty file. `tally` counts
    the files that a folder holds beside data.
    """
    what = f"{kind.__name__} records"
    for file, rows in read_filled(path, files.read_rows, "records", what, tally, may_be_empty):
        for row in rows:
            if isinstance(row, BadRow):
                raise row.error(
                    "" if files.has_named_rows(file) else f"; {_name_maker(kind, file)}"
                )

            try:
                yield parse(kind, pydantic_core.to_json(row.value), row.where)
            except UserError as error:
                raise UserError(error.cause, f"{error.cure}; {_name_maker(kind, file)}") from None
            except ValueError as error:
                raise row.error(
                    f"a value that JSON cannot hold ({error})", "mend the row"
                ) from None


def _name_maker(kind: type, file: File) -> str:
    """Name the command that makes records of this kind of other people's files."""
    if kind is Document:
        return f"`llama2 clean --sources.NAME.path {file.path} --out DIR` reads other formats"

    name = {Preference: "preferences", Prompt: "prompts"}.get(kind, "dialogs")
    flags = f"--kind {name} --sources.NAME.path {file.path} --out DIR"
    return f"`llama2 prepare {flags}` makes them of other formats"


def write(path: str | os.PathLike[str], records: Iterable[object]) -> int:
    """Write records as JSON Lines (packed for `.gz` and `.zst`), atomically, and return how many
    there were."""
    count = 0
    with open_writer(path) as put:
        for record in records:
            put(record)
            count += 1

    return count


@contextmanager
def open_writer(path: str | os.PathLike[str]) -> Iterator[Callable[[object], None]]:
    """Yield a function that writes one more record; the file appears under its name when the block
    ends well."""
    path = Path(path)
    opener: Any = open
    if path.suffix == ".zst":
        opener = import_zstandard().open
    elif path.suffix == ".gz":
        opener = gzip.open

    with atomic.new_file(path) as work, opener(work, "wt", encoding="utf-8") as file:
        yield lambda record: file.write(to_json(record) + "\n")


class StoredRecords(Sequence[Record]):
    """The records of a plain JSON Lines file, read when they are asked for: memory holds where each
    line begins."""

    def __init__(self, kind: type[Record], path: Path) -> None:
        self._kind, self._path = kind, path
        self._starts = array("Q")
        position = 0
        with explain_os_errors(path), json_files.open_file(path) as file:
            for line in file:
                if line.strip():
                    self._starts.append(position)

                position += len(line)

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]

        with explain_os_errors(self._path), open(self._path, "rb") as file:
            file.seek(self._starts[index])
            return parse(self._kind, file.readline(), f"{self._path}, record {index + 1}")


def messages_of(rows: Iterable[tuple[Role, str]]) -> Messages:
    """Return `[("user", "Hi"), ...]` as messages."""
    return tuple(Message(role, content) for role, content in rows)


def dump(value: object) -> str:
    """Return indented JSON with sorted keys: stable across runs."""
    return json.dumps(value, indent=1, sort_keys=True, default=str) + "\n"
