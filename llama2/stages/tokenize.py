"""Tokenize clean documents into memory-mapped shards, one directory a source (§2.1); `pretrain`
mixes them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from llama2.config import StageConfig
from llama2.data.documents import read_documents
from llama2.data.shards import INDEX, Shards, write_shards
from llama2.errors import UserError
from llama2.formats import checkpoint
from llama2.results import TextSize, TokenizedSplit, TokenizeResult
from llama2.runs import Run
from llama2.stages.common.planning import Cluster, PlannedRuns
from llama2.tokenizer.tokenizer import Tokenizer


class Config(StageConfig):
    """Write token shards."""

    documents: Path
    """a `llama2 clean` run: its documents/ and heldout/"""
    tokenizer: Path
    """a tokenizer.model, or a directory that holds one"""


def plan(config: Config, cluster: Cluster, planned: PlannedRuns) -> dict[str, Any]:
    """Return the vocabulary of the tokenizer."""
    return planned.inherit_vocabulary(config.out, config.tokenizer)


def run(config: Config, run: Run) -> None:
    """Write train/<source>/ and validation/<source>/."""
    if not run.ranks.is_main:
        return

    tokenizer = checkpoint.open_tokenizer(config.tokenizer)
    tokenizer.save(run.path)
    train = _tokenize(config.documents / "documents", tokenizer, run, "train")
    validation = _tokenize(config.documents / "heldout", tokenizer, run, "validation")
    run.write_result(TokenizeResult(train=train, validation=validation))


def _tokenize(folder: Path, tokenizer: Tokenizer, run: Run, split: str) -> TokenizedSplit:
    """Write the shards of one split, source by source."""
    sources = {}
    tally = run.tally(split)
    for file in sorted(folder.glob("*.jsonl")):
        target = run.path / split / file.stem
        shards = _find_finished(target, tokenizer)
        if shards is None:
            shards = write_shards(read_documents(file), tokenizer, target)

        tally.read += len(shards)
        tally.kept += len(shards)
        sources[file.stem] = TextSize(
            documents=len(shards),
            tokens=int(shards.lengths_N.sum()),
            bytes=sum(len(document.text.encode()) for document in read_documents(file)),
        )

    if not sources:
        raise UserError(
            f"{folder}: there are no documents",
            "give a finished `llama2 clean` run (with heldout above 0)",
        )

    documents = sum(size.documents for size in sources.values())
    tokens = sum(size.tokens for size in sources.values())
    size = sum(size.bytes for size in sources.values())
    return TokenizedSplit(documents=documents, tokens=tokens, bytes=size, sources=sources)


def _find_finished(target: Path, tokenizer: Tokenizer) -> Shards | None:
    """Return the shards that an earlier attempt finished; damaged ones are named and cleared
    away."""
    if not (target / INDEX).exists():
        return None

    try:
        shards = Shards(target, tokenizer)
        shards.verify()
        return shards
    except UserError as error:
        print(f"{error.cause}; written again", file=sys.stderr)
        (target / INDEX).unlink()
        return None
