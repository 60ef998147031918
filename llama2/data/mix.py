"""The weighted mixture of sources (§2.1: "up-sampling the most factual sources"), exact to the
document.

Weights count tokens, not documents: at any point of the stream each source has given its share to
within one document, for the next document always comes from the source that is furthest behind.
Within a source every pass is a complete permutation before the next begins, so a source read 2.5
times shows each document two or three times.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llama2.errors import UserError

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Mixture:
    """The order in which documents are read: entry n is document `document_N[n]` of source
    `names[source_N[n]]`."""

    names: tuple[str, ...]
    source_N: npt.NDArray[np.int32]
    document_N: Integers
    passes: dict[str, float]  # how often each source is read: tokens drawn over tokens present
    shares: dict[str, float]  # of all tokens drawn


def mix(
    lengths: Mapping[str, Integers], weights: Mapping[str, float], tokens: int, seed: int
) -> Mixture:
    """Draw documents until they hold `tokens` tokens.

    `lengths[name]` are the tokens of each document of a source, `weights[name]` its share of the
    tokens (any scale). The same arguments give the same order. UserError for sources without weight
    or text, and weights without source.
    """
    _check(lengths, weights)
    names = tuple(lengths)
    sizes = [lengths[name].tolist() for name in names]
    present = [sum(size) for size in sizes]
    drawn = [0] * len(names)
    cursors = [(0, 0)] * len(names)  # pass and place in it
    orders = [_permutation(len(size), seed, index, 0) for index, size in enumerate(sizes)]
    behind = [(0.0, index) for index, name in enumerate(names) if weights[name] > 0]
    sources: list[int] = []
    documents: list[int] = []
    total = 0

    while total < tokens:
        _, source = heapq.heappop(behind)
        epoch, place = cursors[source]
        if place == len(orders[source]):
            epoch, place = epoch + 1, 0
            orders[source] = _permutation(len(sizes[source]), seed, source, epoch)

        document = orders[source][place]
        cursors[source] = (epoch, place + 1)
        drawn[source] += sizes[source][document]
        total += sizes[source][document]
        sources.append(source)
        documents.append(document)
        heapq.heappush(behind, (drawn[source] / weights[names[source]], source))

    passes = {name: drawn[index] / present[index] for index, name in enumerate(names)}
    shares = {name: drawn[index] / total for index, name in enumerate(names)}
    return Mixture(
        names,
        np.array(sources, dtype=np.int32),
        np.array(documents, dtype=np.int64),
        passes,
        shares,
    )


def mix_passes(lengths: Mapping[str, Integers], passes: Mapping[str, float], seed: int) -> Mixture:
    """Read each source `passes[name]` times: with whole numbers, each document exactly so often."""
    sizes = {name: int(length_N.sum()) for name, length_N in lengths.items()}
    _check(lengths, passes)
    weights = {name: passes[name] * sizes[name] for name in lengths}

    return mix(lengths, weights, round(sum(weights.values())), seed)


def _permutation(count: int, seed: int, source: int, epoch: int) -> list[int]:
    order: list[int] = np.random.default_rng([seed, source, epoch]).permutation(count).tolist()
    return order


def _check(lengths: Mapping[str, Integers], weights: Mapping[str, float]) -> None:
    if lengths.keys() != weights.keys():
        raise UserError(
            f"the sources are {', '.join(lengths)}, but weights are given for {', '.join(weights)}",
            "give each source one weight",
        )

    for name, length_N in lengths.items():
        if not int(length_N.sum()):
            raise UserError(f"the source '{name}' holds no tokens", "remove it, or check its files")
        if not 0 <= weights[name] < float("inf"):
            raise UserError(
                f"the weight of the source '{name}' is {weights[name]}", "weights are 0 or more"
            )

    if not any(weights.values()):
        raise UserError("all sources have weight 0", "give one of them a weight")
