"""Train the tokenizer (§2.2): SentencePiece BPE, numbers split into digits, unknown characters as
bytes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from llama2 import records
from llama2.config import StageConfig
from llama2.data.documents import read_documents
from llama2.records import Dialog, Document
from llama2.results import TokenizerResult
from llama2.runs import Run
from llama2.stages.common.planning import Cluster, PlannedRuns
from llama2.tally import Tally
from llama2.tokenizer.template import render
from llama2.tokenizer.train import train


class Config(StageConfig):
    """Train a tokenizer on documents."""

    documents: Annotated[tuple[Path, ...], Field(min_length=1)]
    """files, folders, archives or globs (docs/formats.md); of a `llama2 clean` run all but what is
    held out"""
    dialogs: tuple[Path, ...] = ()
    """dialogs to learn from as well, in the chat format: without them its tags cost many tokens a
    turn"""
    vocab_size: int = Field(32000, gt=260)
    max_megabytes: float = Field(200.0, gt=0)
    """train on a random sample of about this much text"""


def plan(config: Config, cluster: Cluster, planned: PlannedRuns) -> dict[str, Any]:
    """Return the vocabulary, which decides the size of what is trained on it."""
    planned.vocabularies[config.out] = config.vocab_size
    return {"vocab_size": config.vocab_size}


def run(config: Config, run: Run) -> None:
    """Write tokenizer.model and its Hugging Face companions into the run directory."""
    if not run.ranks.is_main:
        return

    tally = run.tally("documents")
    documents = _count(read_documents(config.documents, tally=tally), tally)
    tokenizer = train(
        chain(documents, _render_dialogs(config.dialogs)),
        config.vocab_size,
        run.path,
        seed=config.seed,
        sample_bytes=round(config.max_megabytes * 1e6),
    )
    run.write_result(
        TokenizerResult(vocab_size=tokenizer.vocab_size, fingerprint=tokenizer.fingerprint)
    )


def _count(documents: Iterator[Document], tally: Tally) -> Iterator[str]:
    """Yield the texts of documents, and count them."""
    for document in documents:
        tally.kept += 1
        yield document.text


def _render_dialogs(paths: Iterable[Path]) -> Iterator[str]:
    """Yield dialogs in the chat format."""
    for path in paths:
        for dialog in records.read(Dialog, path):
            yield render(dialog.messages)
