"""Exact deduplication (§2.1): whole documents, and lines that many documents share. Memory holds
hashes, never text."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace

from llama2.hashing import hash_number
from llama2.records import Document

_WORD = re.compile(r"\w+")


def fingerprint(text: str) -> int:
    """Return 64 bits of a text's words: equal for texts that differ in case, punctuation or white
    space alone.

    A text without words is told apart by its characters. Among 10 million texts, two different ones
    collide with probability 3e-6.
    """
    words = " ".join(_WORD.findall(text.casefold())) or text
    return hash_number(words)


def drop_duplicates(
    documents: Iterable[Document], counts: Counter[str] | None = None, seen: set[int] | None = None
) -> Iterator[Document]:
    """Give the first document of each text. About 60 bytes of memory a document.

    Sources that share `seen` are deduplicated against one another.
    """
    counts = Counter() if counts is None else counts
    seen = set() if seen is None else seen
    for document in documents:
        key = fingerprint(document.text)
        if key in seen:
            counts["duplicate documents removed"] += 1
            continue

        seen.add(key)
        yield document


def drop_repeated_lines(
    documents: Iterable[Document],
    counts: Counter[str] | None = None,
    *,
    limit: int = 5,
    max_lines: int = 5_000_000,
) -> Iterator[Document]:
    """Give documents without the lines that `limit` documents before them had: menus, footers,
    notices.

    One pass: the first `limit` documents keep the line. At most `max_lines` different lines are
    remembered; beyond that, those seen in the fewest documents are forgotten, which never removes a
    line too many. A document of which nothing is left is dropped.
    """
    counts = Counter() if counts is None else counts
    seen: Counter[int] = Counter()
    for document in documents:
        lines = document.text.split("\n")
        keys = {line: fingerprint(line) for line in lines if line.strip()}
        remaining = [line for line in lines if line not in keys or seen[keys[line]] < limit]
        seen.update(set(keys.values()))

        if len(seen) > max_lines:
            seen = Counter(dict(seen.most_common(max_lines // 2)))

        counts["repeated lines removed"] += len(lines) - len(remaining)
        if len(remaining) == len(lines):
            yield document
        elif text := "\n".join(remaining).strip("\n"):
            yield replace(document, text=text)
        else:
            counts["documents of repeated lines removed"] += 1
