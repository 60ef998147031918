"""Clean documents (§2.1): repair and filter text, mask personal data, deduplicate exactly, and hold
some out.

Duplicates are removed across all sources, the first one named keeping its copy. Held-out documents
are chosen by a hash of their text, so they stay held out when other sources are added. Documents
are written as they are read: memory holds one of them, and 60 bytes for each that was kept.
"""

from __future__ import annotations

import hashlib
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
from llama2.records import Document
from llama2.runs import Run
from llama2.tally import Tally


class Source(Section):
    """Where one source of text lies."""

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

    sources: Annotated[dict[str, Source], Field(min_length=1)]
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
    run.write_json(
        "summary.json",
        {"sources": {name: _clean(config, name, run, seen) for name in config.sources}},
    )


def _clean(config: Config, name: str, run: Run, seen: set[int]) -> dict[str, int]:
    """Write the documents of one source as they come, and count what was done to them."""
    counts, sizes = Counter[str](), Counter[str]()
    with ExitStack() as stack:
        keep = stack.enter_context(records.writing(run.path / "documents" / f"{name}.jsonl"))
        aside = None
        for document in _documents(config, config.sources[name], run.tally(name), counts, seen):
            sizes["kept"] += 1
            sizes["bytes"] += len(document.text.encode())
            if _held_out(document, config.heldout):
                sizes["held out"] += 1
                aside = aside or stack.enter_context(
                    records.writing(run.path / "heldout" / f"{name}.jsonl")
                )
                aside(document)
            else:
                keep(document)

    _account(run.tally(name), counts, sizes["kept"])
    return {**counts, **{key: sizes[key] for key in ("kept", "held out", "bytes")}}


def _documents(
    config: Config, source: Source, tally: Tally, counts: Counter[str], seen: set[int]
) -> Iterator[Document]:
    """The clean documents of a source; none of them is held in memory."""
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
    """What became of the documents, for the line at the end of the run."""
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
    for document in documents:
        if longest and len(document.text) > longest:
            tally.cut += 1

        yield from _cut(document, longest) if longest else (document,)


def _cut(document: Document, longest: int) -> Iterator[Document]:
    """A document in pieces of at most `longest` characters, at the ends of lines where there are
    any."""
    text, number = document.text, 0
    while text:
        end = len(text) if len(text) <= longest else (text.rfind("\n", 0, longest) + 1 or longest)
        yield replace(document, text=text[:end], id=f"{document.id}#{number}")
        text, number = text[end:], number + 1


def _held_out(document: Document, share: float) -> bool:
    digest = hashlib.blake2b(document.text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < share * 2**64
