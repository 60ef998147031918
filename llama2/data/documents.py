"""Read pretraining text (§2.1) from the formats people have: plain text, JSON Lines, parquet; files, folders, globs.

Everything streams: memory holds one document (one batch of rows for parquet) at a time. docs/formats.md describes the
formats for users.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import pydantic_core

from llama2.errors import UserError, explain_os_errors, missing_extra
from llama2.records import Document, read_lines

Split = Literal["file", "paragraph", "line"]
_TEXT, _LINES, _PARQUET = (".txt", ".text", ".md", ".rst"), (".jsonl", ".ndjson"), (".parquet",)
_PACKED = (".gz", ".zst")


def read_documents(
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]], *, split: Split = "file"
) -> Iterator[Document]:
    """The documents of files, folders (searched through) and globs, in sorted order within each.

    `split` says what one document of a plain text file is: the file, a paragraph (between blank lines) or a line.
    UserError names the file and line of what cannot be read, and a file or a whole set without any document.
    """
    listed = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    for file in find_files(listed):
        empty = True
        for document in _reader(file, split):
            empty = False
            yield document
        if empty:
            raise UserError(f"{file}: there is no document in it", "remove the file, or fill it")


def find_files(paths: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """The files of known formats that the paths name; UserError if one of them names none."""
    files: list[Path] = []
    for path in paths:
        here = Path(path)
        if here.is_dir():
            found = sorted(file for file in here.rglob("*") if file.is_file() and _format(file))
        elif here.exists():
            if not _format(here):
                raise UserError(f"{here}: unknown format", f"known: {', '.join((*_TEXT, *_LINES, *_PARQUET))}, "
                                                           f"packed or not ({', '.join(_PACKED)})")
            found = [here]
        else:
            matches = (Path(match) for match in glob.glob(str(path), recursive=True))
            found = sorted(file for file in matches if file.is_file() and _format(file))
        if not found:
            raise UserError(f"{path}: no such file, and no file of a known format matches it", "check the path")
        files += found
    return files


def _format(file: Path) -> str:
    """The suffix that says how to read a file, without that of its packing; empty if unknown."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes and suffixes[-1] in _PACKED:
        suffixes.pop()
    suffix = suffixes[-1] if suffixes else ""
    return suffix if suffix in (*_TEXT, *_LINES, *_PARQUET) else ""


def _reader(file: Path, split: Split) -> Iterator[Document]:
    kind = _format(file)
    if kind in _PARQUET:
        return _read_parquet(file)
    return _read_json_lines(file) if kind in _LINES else _read_text(file, split)


def _read_text(file: Path, split: Split) -> Iterator[Document]:
    lines: list[str] = []
    start = last = 0
    for number, line in read_lines(file):
        if split == "line":
            yield Document(line.rstrip("\r\n"), f"{file}:{number}")
            continue
        if lines and number > last + 1:  # read_lines leaves blank lines out
            if split == "paragraph":
                yield Document("".join(lines).rstrip("\r\n"), f"{file}:{start}")
                lines = []
            else:
                lines.append("\n" * (number - last - 1))
        start = start if lines else number
        lines.append(line)
        last = number
    if lines:
        yield Document("".join(lines).rstrip("\r\n"), str(file) if split == "file" else f"{file}:{start}")


def _read_json_lines(file: Path) -> Iterator[Document]:
    for number, line in read_lines(file):
        where = f"{file}:{number}"
        try:
            row = pydantic_core.from_json(line)  # unlike json, it refuses what UTF-8 cannot hold
        except ValueError as error:
            raise UserError(f"{where}: not JSON ({error})", "each line must be one JSON object") from error
        if not isinstance(row, dict):
            raise UserError(f"{where}: a {type(row).__name__}, not a JSON object", "each line must be one JSON object")
        yield _document(row, where)


def _read_parquet(file: Path) -> Iterator[Document]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise missing_extra("pyarrow", "data") from None
    number = 0
    try:
        with explain_os_errors(file), open(file, "rb") as opened:
            table = parquet.ParquetFile(opened)
            if "text" not in table.schema_arrow.names:
                raise UserError(f"{file}: no column 'text'", f"its columns: {', '.join(table.schema_arrow.names)}")
            for batch in table.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield _document(row, f"{file}:{number}")
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file}:{number + 1}: truncated or corrupt parquet ({error})", "fetch it again") from error


def _document(row: dict[str, Any], where: str) -> Document:
    """A row with a text; what else it holds becomes metadata, and `where` its id if it has none."""
    text, name = row.pop("text", None), row.pop("id", None)
    if not isinstance(text, str):
        found = f"'text' is a {type(text).__name__}" if text is not None else f"no 'text' among {sorted(row)}"
        raise UserError(f"{where}: {found}", "each document needs a string 'text'")
    metadata = row.pop("metadata", None)
    extra = metadata if isinstance(metadata, dict) else {} if metadata is None else {"metadata": metadata}
    return Document(text, where if name is None else str(name), {**row, **extra})
