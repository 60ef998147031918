"""Tokenized documents on disk: memory-mapped shards that training reads at any place without
loading them.

A directory holds pairs of files and `index.json`, which is written last:

    tokens-00000.bin      ids of all documents one after another, little-endian uint16 (uint32
                          from 65,537 items on)
    documents-00000.bin   where each document ends in it, little-endian int64
    index.json            version, dtype, vocab_size, tokenizer (its fingerprint), counts,
                          sha256 of each file

Each document is BOS, its ids, EOS; a tokenizer that adds no BOS has EOS in its place, as models
without BOS were trained on documents with EOS between them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llama2 import atomic, json_files
from llama2.errors import UserError, explain_os_errors
from llama2.hashing import hash_content, hash_file
from llama2.records import Document, dump
from llama2.tokenizer import Tokenizer

INDEX, _VERSION = "index.json", 1
_BATCH_BYTES = 8 << 20


def write_shards(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    directory: str | os.PathLike[str],
    *,
    shard_tokens: int = 1 << 28,
    threads: int = 1,
) -> Shards:
    """Tokenize documents into `directory`, a new shard every `shard_tokens` tokens; memory holds a
    few megabytes.

    A directory without index (an interrupted run) is written afresh; one with an index is refused
    with UserError.
    """
    directory = Path(directory)
    if (directory / INDEX).exists():
        raise UserError(
            f"{directory}: already holds token shards", "remove them or choose another directory"
        )

    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    files: list[dict[str, Any]] = []
    with explain_os_errors(directory):
        atomic.make(directory)
        encoded = _encode(documents, tokenizer, dtype, threads)
        for document in encoded:
            rest = chain([document], encoded)
            files.append(_write_shard(rest, directory, len(files), shard_tokens))

        if not files:
            raise UserError(
                f"{directory}: there are no documents to tokenize",
                "check the sources and cleaning rules",
            )

        index = {
            "version": _VERSION,
            "dtype": dtype.name,
            "vocab_size": tokenizer.vocab_size,
            "tokenizer": tokenizer.fingerprint,
            "files": files,
        }
        atomic.write_atomic(directory / INDEX, dump(index))

    return Shards(directory, tokenizer)


def _write_shard(
    documents: Iterable[npt.NDArray[Any]], directory: Path, number: int, shard_tokens: int
) -> dict[str, Any]:
    """Write documents until there are `shard_tokens` tokens; return the shard's entry in the
    index."""
    ends: list[int] = []
    end, digest, name = 0, hashlib.sha256(), f"tokens-{number:05}.bin"
    with atomic.new_file(directory / name) as work, open(work, "wb") as file:
        for document in documents:
            content = document.tobytes()
            file.write(content)
            digest.update(content)
            end += len(document)
            ends.append(end)
            if end >= shard_tokens:
                break

    ends_name = f"documents-{number:05}.bin"
    ends_content = np.array(ends, dtype="<i8").tobytes()
    atomic.write_atomic(directory / ends_name, ends_content)
    return {
        "tokens": name,
        "tokens_sha256": digest.hexdigest(),
        "token_count": end,
        "documents": ends_name,
        "documents_sha256": hash_content(ends_content),
        "document_count": len(ends),
    }


def _encode(
    documents: Iterable[Document], tokenizer: Tokenizer, dtype: np.dtype[Any], threads: int
) -> Iterator[npt.NDArray[Any]]:
    """Give the ids of each document, encoded in batches so that several threads have work."""

    def flush(batch: list[str]) -> Iterator[npt.NDArray[Any]]:
        for ids in tokenizer.encode_many(batch, threads):
            yield np.array([tokenizer.document_start, *ids, tokenizer.eos], dtype=dtype)

    batch: list[str] = []
    size = 0
    for document in documents:
        batch.append(document.text)
        size += len(document.text)
        if size > _BATCH_BYTES:
            yield from flush(batch)
            batch, size = [], 0

    yield from flush(batch)


class Shards:
    """The documents of a directory of shards, as memory-mapped arrays of ids.

    With a tokenizer, UserError if the shards were made by another one. Missing or shortened files
    are named.
    """

    def __init__(
        self, directory: str | os.PathLike[str], tokenizer: Tokenizer | None = None
    ) -> None:
        self.directory = Path(directory)
        where = self.directory / INDEX
        self._index = json_files.read_object(where, "tokenize again")

        try:
            self.vocab_size: int = self._index["vocab_size"]
            self.fingerprint: str = self._index["tokenizer"]
            dtype, version, files = (
                self._index["dtype"],
                self._index["version"],
                self._index["files"],
            )
        except KeyError as error:
            raise UserError(
                f"{where}: not an index of token shards (it has no {error})", "tokenize again"
            ) from error

        if version != _VERSION:
            raise UserError(f"{where}: version {version}, expected {_VERSION}", "tokenize again")
        if tokenizer is not None and tokenizer.fingerprint != self.fingerprint:
            raise UserError(
                f"{self.directory}: these shards were made with another tokenizer "
                f"(sha256 {self.fingerprint[:12]}, yours {tokenizer.fingerprint[:12]})",
                "use the tokenizer they were made with, or tokenize again",
            )

        self._tokens = [self._map(file["tokens"], dtype, file["token_count"]) for file in files]
        self._ends = [self._map(file["documents"], "<i8", file["document_count"]) for file in files]
        # number of each shard's first document
        self._first = np.cumsum([0, *(len(ends) for ends in self._ends)])
        self.tokens = sum(len(tokens) for tokens in self._tokens)

    def __len__(self) -> int:
        return int(self._first[-1])

    @property
    def lengths_N(self) -> npt.NDArray[np.int64]:
        """Tokens of each document, BOS and EOS included."""
        return np.concatenate([np.diff(ends, prepend=0) for ends in self._ends]).astype(np.int64)

    def document(self, number: int) -> npt.NDArray[Any]:
        """Return the ids of document `number`, BOS and EOS included: a view of the file, not to be
        written to."""
        if not 0 <= number < len(self):
            raise IndexError(number)

        shard = int(np.searchsorted(self._first, number, side="right")) - 1
        ends, local = self._ends[shard], number - int(self._first[shard])
        return self._tokens[shard][int(ends[local - 1]) if local else 0 : int(ends[local])]

    def verify(self) -> None:
        """Read every file and compare its sha256 with the index; UserError names the one that
        differs."""
        for file in self._index["files"]:
            for kind in ("tokens", "documents"):
                path = self.directory / file[kind]
                if hash_file(path) != file[f"{kind}_sha256"]:
                    raise UserError(
                        f"{path}: its checksum differs from the index",
                        "copy or tokenize it again",
                    )

    def _map(self, name: str, dtype: str, count: int) -> npt.NDArray[Any]:
        path, kind = self.directory / name, np.dtype(dtype).newbyteorder("<")
        with explain_os_errors(path):
            size = path.stat().st_size
            if size != count * kind.itemsize:
                raise UserError(
                    f"{path}: {size} bytes, expected {count * kind.itemsize}",
                    "copy or tokenize it again",
                )

            return np.memmap(path, dtype=kind, mode="r")


def verify(every: Iterable[Shards]) -> None:
    """UserError names a file whose content differs from its index."""
    for shards in every:
        shards.verify()
