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
from llama2.runs import Run
from llama2.stages.common.planning import Cluster, Lineage
from llama2.tokenizer.tokenizer import Tokenizer


class Config(StageConfig):
    """Write token shards."""

    documents: Path
    """a `llama2 clean` run: its documents/ and heldout/"""
    tokenizer: Path
    """a tokenizer.model, or a directory that holds one"""


def plan(config: Config, cluster: Cluster, lineage: Lineage) -> dict[str, Any]:
    """The vocabulary of the tokenizer."""
    return lineage.inherit_vocabulary(config.out, config.tokenizer)


def run(config: Config, run: Run) -> None:
    """Write train/<source>/ and validation/<source>/."""
    if not run.ranks.is_main:
        return

    tokenizer = Tokenizer.load(config.tokenizer)
    tokenizer.save(run.path)
    summary: dict[str, Any] = {}

    for split, folder in (("train", "documents"), ("validation", "heldout")):
        counts = {}
        for file in sorted((config.documents / folder).glob("*.jsonl")):
            target = run.path / split / file.stem
            shards = _finished(target, tokenizer) or write_shards(
                read_documents(file), tokenizer, target
            )
            run.tally(split).read += len(shards)
            run.tally(split).kept += len(shards)
            counts[file.stem] = {
                "documents": len(shards),
                "tokens": int(shards.lengths_N.sum()),
                "bytes": sum(len(document.text.encode()) for document in read_documents(file)),
            }

        if not counts:
            raise UserError(
                f"{config.documents / folder}: there are no documents",
                "give a finished `llama2 clean` run (with heldout above 0)",
            )

        total = {
            key: sum(one[key] for one in counts.values())
            for key in ("documents", "tokens", "bytes")
        }
        summary[split] = {**total, "sources": counts}

    run.write_json("summary.json", summary)


def _finished(target: Path, tokenizer: Tokenizer) -> Shards | None:
    """The shards that an earlier attempt finished; damaged ones are named and cleared away."""
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
