"""Read pretraining text (§2.1) from the formats people have: plain text, JSON Lines, parquet;
files, folders, globs.

Everything streams but JSON: memory holds one document (one batch of rows for parquet) at a time.
`files` decides what a path stands for; docs/formats.md describes the formats for users.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Literal

from llama2.reading import files
from llama2.reading.files import BadRow, File, Row
from llama2.reading.rows import TO_UTF8, read_lines
from llama2.records import Document
from llama2.tally import Tally

Split = Literal["file", "paragraph", "line"]
Malformed = Literal["stop", "skip"]


def read_documents(
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    *,
    split: Split = "file",
    tally: Tally | None = None,
    malformed: Malformed = "stop",
    also: str = "",
) -> Iterator[Document]:
    """Give the documents of files, folders (searched through) and globs, in sorted order within
    each.

    `split` says what one document of a plain text file is: the file, a paragraph (between blank
    lines) or a line. `tally` counts documents read, rows left out as malformed, and files left out.
    UserError names the file and line of what cannot be read, unless `malformed` rows are skipped,
    and a file or a whole set without any document; `also` is a way out that it names beside its
    own.
    """
    tally = tally or Tally()
    filled = files.read_filled(paths, _reader(split), "documents", "documents", tally)
    for item in chain.from_iterable(items for _, items in filled):
        tally.read += 1
        if isinstance(item, Document):
            yield item
        elif malformed == "stop":
            raise item.error(also)
        else:
            tally.skip("malformed")


def _reader(split: Split) -> Callable[[File], Iterator[Document | BadRow]]:
    def read(file: File) -> Iterator[Document | BadRow]:
        return (
            _paragraphs(file, split)
            if file.kind == ".txt"
            else map(_document, files.read_rows(file))
        )

    return read


def _paragraphs(file: File, split: Split) -> Iterator[Document | BadRow]:
    """The documents of a plain text file. Blank lines at its ends, or around a paragraph, belong to
    none."""
    held: list[str] = []
    flawed: BadRow | None = None
    start = blank = 0

    for number, text, flaw in read_lines(file):
        if not text.strip():
            blank += 1
            continue

        if held and (split == "line" or (split == "paragraph" and blank)):
            yield flawed or _joined(file, held, start, split)
            held, flawed = [], None

        held += [""] * (blank if held else 0)
        start, blank = start if held else number, 0
        held.append(text)
        flawed = flawed or (BadRow(f"{file.label}:{number}", flaw, TO_UTF8) if flaw else None)

    if held:
        yield flawed or _joined(file, held, start, split)


def _joined(file: File, held: list[str], start: int, split: Split) -> Document:
    return Document("\n".join(held), file.label if split == "file" else f"{file.label}:{start}")


def _document(row: Row | BadRow) -> Document | BadRow:
    """A row with a text; what else it holds becomes metadata, and `where` its id if it has none."""
    if isinstance(row, BadRow):
        return row
    if not isinstance(row.value, dict):
        return BadRow(
            row.where,
            f"a {type(row.value).__name__}, not a JSON object",
            "each row must be one object",
        )

    fields = dict(row.value)
    text, name, metadata = (fields.pop(key, None) for key in ("text", "id", "metadata"))
    if not isinstance(text, str):
        cause = f"no 'text' among {sorted(fields)}"
        if "text" in row.value:
            cause = "'text' is " + ("null" if text is None else f"a {type(text).__name__}")

        return BadRow(row.where, cause, "each document needs a string 'text'")

    extra = (
        metadata
        if isinstance(metadata, dict)
        else {}
        if metadata is None
        else {"metadata": metadata}
    )
    return Document(text, row.where if name is None else str(name), {**fields, **extra})
