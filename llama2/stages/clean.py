"""Clean documents (§2.1): repair and filter text, mask personal data, deduplicate exactly, and hold some out.

Duplicates are removed across all sources, the first one named keeping its copy. Held-out documents are chosen by a
hash of their text, so they stay held out when other sources are added.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from llama2 import mesh, records
from llama2.config import Config as Section
from llama2.config import StageConfig
from llama2.data import deduplicate
from llama2.data.clean import Rules, clean
from llama2.data.documents import read_documents
from llama2.records import Document
from llama2.runs import Run


class Source(Section):
    """Where one source of text lies."""

    incidental: ClassVar[frozenset[str]] = frozenset({"license"})

    path: Path
    """a file or directory: text, JSONL (.gz, .zst), parquet"""
    split: Literal["file", "paragraph", "line"] = "file"
    """what one document of a plain text file is"""
    repeated_lines: int = Field(0, ge=0)
    """drop a line after this many documents of the source have had it (menus, footers of web pages); 0 keeps all"""
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
    if not mesh.is_main():
        return
    rules = Rules(min_characters=config.min_characters, remove_boilerplate=config.remove_boilerplate,
                  mask_personal_data=config.mask_personal_data)
    seen: set[int] = set()
    summary = {}
    for name, source in config.sources.items():
        counts: Counter[str] = Counter()
        raw = _pieces(read_documents(source.path, split=source.split), config.max_characters)
        documents = clean(raw, rules, counts)
        if source.repeated_lines:
            documents = deduplicate.drop_repeated_lines(documents, counts, limit=source.repeated_lines)
        kept = list(deduplicate.drop_duplicates(documents, counts, seen))
        aside = [_held_out(document, config.heldout) for document in kept]
        records.write(run.path / "documents" / f"{name}.jsonl", (d for d, out in zip(kept, aside) if not out))
        if any(aside):
            records.write(run.path / "heldout" / f"{name}.jsonl", (d for d, out in zip(kept, aside) if out))
        summary[name] = {**counts, "kept": len(kept), "held out": sum(aside),
                         "bytes": sum(len(document.text.encode()) for document in kept)}
    run.write_json("summary.json", {"sources": summary})


def _pieces(documents: Iterator[Document], longest: int) -> Iterator[Document]:
    return chain.from_iterable(_cut(document, longest) for document in documents) if longest else documents


def _cut(document: Document, longest: int) -> Iterator[Document]:
    """A document in pieces of at most `longest` characters, at the ends of lines where there are any."""
    text, number = document.text, 0
    while text:
        end = len(text) if len(text) <= longest else (text.rfind("\n", 0, longest) + 1 or longest)
        yield replace(document, text=text[:end], id=f"{document.id}#{number}")
        text, number = text[end:], number + 1


def _held_out(document: Document, share: float) -> bool:
    digest = hashlib.blake2b(document.text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < share * 2**64
