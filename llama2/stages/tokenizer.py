"""Train the tokenizer (§2.2): SentencePiece BPE, numbers split into digits, unknown characters as
bytes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from llama2 import records
from llama2.config import StageConfig
from llama2.data.documents import read_documents
from llama2.records import Dialog, Document
from llama2.runs import Run
from llama2.stages.common.planning import Cluster, Lineage
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


def plan(config: Config, cluster: Cluster, lineage: Lineage) -> dict[str, Any]:
    """The vocabulary, which decides the size of what is trained on it."""
    lineage.vocabularies[config.out] = config.vocab_size
    return {"vocab_size": config.vocab_size}


def run(config: Config, run: Run) -> None:
    """Write tokenizer.model and its Hugging Face companions into the run directory."""
    if run.ranks.is_main:
        texts = chain(
            _counted(
                read_documents(config.documents, tally=run.tally("documents")),
                run.tally("documents"),
            ),
            (render(one.messages) for path in config.dialogs for one in records.read(Dialog, path)),
        )
        tokenizer = train(
            texts,
            config.vocab_size,
            run.path,
            seed=config.seed,
            sample_bytes=round(config.max_megabytes * 1e6),
        )
        run.write_json(
            "summary.json",
            {"vocab_size": tokenizer.vocab_size, "fingerprint": tokenizer.fingerprint},
        )


def _counted(documents: Iterator[Document], tally: Tally) -> Iterator[str]:
    for document in documents:
        tally.kept += 1
        yield document.text
