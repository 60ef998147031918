"""Log-probabilities and reward model scores of given token rows, in batches (§3.2.2, §3.2.3).

Rows are sorted by length and padded on the right, which changes no result: attention is causal, and
a score is read at the last real token. Under several `ranks` the batches are dealt out and every
rank returns all results; each rank makes the same number of forward passes, which sharded models
need.

Shapes: B rows, T their longest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import chain
from typing import TypeVar

import torch
from torch import Tensor, nn

from llama2 import kernels
from llama2.devices import Precision, autocast
from llama2.errors import UserError
from llama2.model.llama import Llama
from llama2.model.scorer import Scorer
from llama2.ranks import Ranks

Row = Sequence[int]
R = TypeVar("R")


def compute_logprobs(
    model: Llama,
    rows: Sequence[Row],
    precision: Precision = "bf16",
    batch_tokens: int = 16384,
    *,
    ranks: Ranks | None = None,
) -> list[list[float]]:
    """Return log p(row[t] | row[:t]) for t = 1, 2, ...: one number fewer than the row has tokens.

    `batch_tokens`: the most padded tokens of a forward pass. UserError for a row beyond the model's
    context.
    """

    def work(tokens_BT: Tensor, lengths: Sequence[int]) -> list[list[float]]:
        if tokens_BT.shape[1] == 1:
            return [[] for _ in lengths]

        inputs_BT, targets_BT = tokens_BT[:, :-1].contiguous(), tokens_BT[:, 1:].contiguous()
        table: list[list[float]] = model(inputs_BT, targets_BT=targets_BT).tolist()
        return [row[: length - 1] for row, length in zip(table, lengths)]

    return _run_rows(
        model, model.config.max_position_embeddings, rows, work, precision, batch_tokens, ranks
    )


def predict_tokens(
    model: Llama,
    rows: Sequence[Row],
    precision: Precision = "bf16",
    batch_tokens: int = 2048,
    *,
    ranks: Ranks | None = None,
) -> list[tuple[list[float], list[int]]]:
    """Return the numbers of `compute_logprobs`, and the likeliest token at each of these positions:
    the choice of greedy decoding.

    `batch_tokens`: the most padded tokens of a forward pass, whose logits are held. UserError for a
    row beyond the model's context.
    """

    def work(tokens_BT: Tensor, lengths: Sequence[int]) -> list[tuple[list[float], list[int]]]:
        if tokens_BT.shape[1] == 1:
            return [([], []) for _ in lengths]

        logp_BTV = model(tokens_BT[:, :-1].contiguous()).log_softmax(-1)
        logp_BT = logp_BTV.gather(2, tokens_BT[:, 1:, None])[..., 0].tolist()
        best_BT = logp_BTV.argmax(-1).tolist()
        return [
            (logp[: length - 1], best[: length - 1])
            for logp, best, length in zip(logp_BT, best_BT, lengths)
        ]

    return _run_rows(
        model, model.config.max_position_embeddings, rows, work, precision, batch_tokens, ranks
    )


def score_rows(
    scorer: Scorer,
    rows: Sequence[Row],
    precision: Precision = "bf16",
    batch_tokens: int = 16384,
    *,
    ranks: Ranks | None = None,
    name: object = "the reward model",
) -> list[float]:
    """Return the raw score (before any sigmoid) of each row, read at its last token: r(x, y) of
    equation 1.

    `batch_tokens`: the most padded tokens of a forward pass. UserError for a row beyond the
    scorer's context, and for a score that is not finite, which names the scorer by `name`: such a
    score would win or lose every comparison.
    """

    def work(tokens_BT: Tensor, lengths: Sequence[int]) -> list[float]:
        lengths_B = torch.tensor(lengths, device=tokens_BT.device)
        scores: list[float] = scorer(tokens_BT, lengths_B=lengths_B).float().tolist()
        return scores

    result = _run_rows(
        scorer, scorer.config.max_position_embeddings, rows, work, precision, batch_tokens, ranks
    )
    check_finite(result, [len(row) for row in rows], name)
    return result


def check_finite(scores: Sequence[float], lengths: Sequence[int], name: object) -> None:
    """UserError for scores of rows that are not finite; it names the scorer."""
    bad = [index for index, value in enumerate(scores) if not math.isfinite(value)]
    if bad:
        raise UserError(
            f"{name}: {len(bad)} of {len(scores)} scores are not finite numbers (the first is "
            f"{scores[bad[0]]}, of row {bad[0] + 1} with {lengths[bad[0]]} tokens)",
            "its weights are damaged or its training diverged: train it again, with a lower "
            "learning_rate, or name another reward model",
        )


def _run_rows(
    model: nn.Module,
    context: int,
    rows: Sequence[Row],
    work: Callable[[Tensor, Sequence[int]], list[R]],
    precision: Precision,
    batch_tokens: int,
    ranks: Ranks | None,
) -> list[R]:
    """Return the results of `work(tokens_BT, lengths)` for batches of rows, in the order of
    `rows`."""
    for index, row in enumerate(rows):
        if not 0 < len(row) <= context:
            raise UserError(
                f"row {index + 1} of {len(rows)} has {len(row)} tokens, the context of the model "
                f"holds 1 to {context}",
                "drop or shorten it",
            )

    device = next(model.parameters()).device

    def pad(batch: Sequence[int]) -> list[R]:
        lengths = [len(rows[index]) for index in batch]
        padded = [(*rows[index], *(0,) * (max(lengths) - len(rows[index]))) for index in batch]
        return work(torch.tensor(padded, device=device), lengths)

    return run_batches(model, [len(row) for row in rows], pad, precision, batch_tokens, ranks)


def run_batches(
    model: nn.Module,
    lengths: Sequence[int],
    work: Callable[[Sequence[int]], list[R]],
    precision: Precision,
    batch_tokens: int,
    ranks: Ranks | None,
) -> list[R]:
    """Return the results of `work(indices)`, in the order of the indices 0, 1, ..., for batches of
    rows of these lengths."""
    batches = _make_batches(lengths, batch_tokens)
    ranks = ranks or Ranks.alone()
    share = ranks.share(batches)
    rounds = -(-len(batches) // ranks.data.size)
    results: list[list[R]] = []
    kernels.install(model)

    with torch.inference_mode(), autocast(next(model.parameters()).device, precision):
        for turn in range(rounds):
            # a rank without work takes part all the same
            done = work(share[turn] if turn < len(share) else batches[0])
            if turn < len(share):
                results.append(done)

    order = chain(*batches)
    by_row = dict(zip(order, chain(*ranks.unshare(results))))
    return [by_row[index] for index in range(len(lengths))]


def _make_batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Return the indices of rows, longest first, in batches of at most `batch_tokens` padded tokens
    (or of one row)."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    batches = []
    while order:
        size = max(1, batch_tokens // lengths[order[0]])
        batches.append(order[:size])
        order = order[size:]

    return batches
