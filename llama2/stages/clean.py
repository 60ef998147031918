"""Clean documents (§2.1): repair and filter text, mask personal data, deduplicate exactly, and hold
some out.

Duplicates are removed across all sources, the first one named keeping its copy. Held-out documents
are chosen by a hash of their text, so they stay held out when other sources are added. Documents
are written as they are read: memory holds one of them, and 60 bytes for each that was kept.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from llama2 import records
from llama2.config import Config as Section
from llama2.config import StageConfig
from llama2.data import deduplicate
from llama2.data.clean import Rules, clean
from llama2.data.documents import Malformed, read_documents
from llama2.hashing import hash_number
from llama2.records import Document
from llama2.results import CleanedSource, CleanResult
from llama2.runs import Run
from llama2.tally import Tally


class TextSource(Section):
    """One source of text."""

    incidental: ClassVar[frozenset[str]] = frozenset({"license"})

    path: Path
    """a file, folder, archive or glob (docs/formats.md)"""
    split: Literal["file", "paragraph", "line"] = "file"
    """what one document of a plain text file is"""
    repeated_lines: int = Field(0, ge=0)
    """drop a line after this many documents of the source have had it (menus, footers of web
    pages); 0 keeps all"""
    malformed: Malformed = "stop"
    """a row that cannot be read ends the run, or is skipped and counted"""
    license: str | None = None
    """its licence, for the papers of a release; nothing depends on it"""


class Config(StageConfig):
    """Turn raw text into clean documents."""

    sources: Annotated[dict[str, TextSource], Field(min_length=1)]
    """name -> where it lies"""
    min_characters: int = Field(20, ge=0)
    remove_boilerplate: bool = True
    mask_personal_data: bool = True
    max_characters: int = Field(0, ge=0)
    """cut longer documents at this length, into several; 0: never"""
    heldout: float = Field(0.01, ge=0, lt=1)
    """share of documents kept for validation"""


def run(config: Config, run: Run) -> None:
    """Write documents/<source>.jsonl and heldout/<source>.jsonl."""
    if not run.ranks.is_main:
        return

    seen: set[int] = set()
    sources = {name: _clean(config, name, run, seen) for name in config.sources}
    run.write_result(CleanResult(sources=sources))


def _clean(config: Config, name: str, run: Run, seen: set[int]) -> CleanedSource:
    """Write the documents of one source as they come, and count what was done to them."""
    tally, counts = run.tally(name), Counter[str]()
    count = heldout = size = 0
    with ExitStack() as stack:
        write = stack.enter_context(records.open_writer(run.path / "documents" / f"{name}.jsonl"))
        write_heldout = None
        for document in _documents(config, config.sources[name], tally, counts, seen):
            count += 1
            size += len(document.text.encode())
            if not _is_heldout(document, config.heldout):
                write(document)
                continue

            if write_heldout is None:
                file = run.path / "heldout" / f"{name}.jsonl"
                write_heldout = stack.enter_context(records.open_writer(file))

            heldout += 1
            write_heldout(document)

    _account(tally, counts, count)
    documents = counts.pop("documents", 0)
    del counts["kept"]  # before duplicates were dropped
    return CleanedSource(
        documents=documents, kept=count, heldout=heldout, bytes=size, changes=dict(counts)
    )


def _documents(
    config: Config, source: TextSource, tally: Tally, counts: Counter[str], seen: set[int]
) -> Iterator[Document]:
    """Yield the clean documents of a source; none of them is held in memory."""
    rules = Rules(
        min_characters=config.min_characters,
        remove_boilerplate=config.remove_boilerplate,
        mask_personal_data=config.mask_personal_data,
    )
    raw = read_documents(
        source.path,
        split=source.split,
        tally=tally,
        malformed=source.malformed,
        also=", or leave out what cannot be read with malformed: skip",
    )
    documents = clean(_pieces(raw, config.max_characters, tally), rules, counts)

    if source.repeated_lines:
        documents = deduplicate.drop_repeated_lines(documents, counts, limit=source.repeated_lines)

    return deduplicate.drop_duplicates(documents, counts, seen)


def _account(tally: Tally, counts: Counter[str], kept: int) -> None:
    """Count what became of the documents, for the line at the end of the run."""
    tally.kept = kept
    for key, count in counts.items():
        if key.startswith("dropped: "):
            tally.skip(key.removeprefix("dropped: "), count=count)

    for key, reason in (
        ("duplicate documents removed", "duplicate"),
        ("documents of repeated lines removed", "nothing but repeated lines"),
    ):
        if counts[key]:
            tally.skip(reason, count=counts[key])


def _pieces(documents: Iterator[Document], longest: int, tally: Tally) -> Iterator[Document]:
    """Yield documents of at most `longest` characters; 0: as they are."""
    for document in documents:
        if longest and len(document.text) > longest:
            tally.cut += 1

        yield from _cut(document, longest) if longest else (document,)


def _cut(document: Document, longest: int) -> Iterator[Document]:
    """Cut a document into pieces of at most `longest` characters, at the ends of lines where there
    are any."""
    text, number = document.text, 0
    while text:
        end = len(text) if len(text) <= longest else (text.rfind("\n", 0, longest) + 1 or longest)
        yield replace(document, text=text[:end], id=f"{document.id}#{number}")
        text, number = text[end:], number + 1


def _is_heldout(document: Document, share: float) -> bool:
    """Decide by a hash of the text."""
    return hash_number(document.text) < share * 2**64
