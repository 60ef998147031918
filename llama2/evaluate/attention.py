"""Heat map of Figure 10 (§3.3): how much a model looks back at the instruction of the first turn.

For every answer token the largest attention over all layers and heads on each earlier token,
neighbouring tokens binned. Fused kernels never form the attention weights, so they are computed
again here from queries and keys, which a hook on each attention module provides; the model's code
stays as it is.

Shapes: B = 1 row, T positions, H query heads, K key heads, E head dimension.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama2.model.llama import Attention, Context, Llama
from llama2.model.positions import causal, rotate
from llama2.records import Messages
from llama2.tokenizer.template import encode_dialog, encode_prompt
from llama2.tokenizer.tokenizer import Tokenizer

MOST_BINS = 72


@torch.no_grad()
def largest(model: Llama, tokens: Sequence[int]) -> Tensor:
    """Return the largest attention weight over layers and heads, [T, T] in fp32 on the CPU: row t
    looks at column s <= t."""
    length = len(tokens)
    top_TT = torch.zeros(length, length, device=model.device)

    def watch(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        assert isinstance(module, Attention)
        for weights_TT in weights(module, *arguments):
            torch.maximum(top_TT, weights_TT, out=top_TT)

    attentions = [module for module in model.modules() if isinstance(module, Attention)]
    handles = [module.register_forward_pre_hook(watch) for module in attentions]
    try:
        model(torch.tensor([list(tokens)], device=model.device), head=False)
    finally:
        for handle in handles:
            handle.remove()

    return top_TT.cpu()


def weights(attention: Attention, x_BTD: Tensor, context: Context) -> Iterator[Tensor]:
    """Yield softmax(q k / sqrt(E)) of one row under the causal mask, [T, T] in fp32, head after
    head: all of them at once would be the largest tensor of an evaluation."""
    rows, length, _ = x_BTD.shape
    heads = (rows, length, -1, attention.head_dim)
    q_BTHE = rotate(attention.q_proj(x_BTD).view(heads), context.cos_BT1E, context.sin_BT1E)
    k_BTKE = rotate(attention.k_proj(x_BTD).view(heads), context.cos_BT1E, context.sin_BT1E)
    q_HTE, k_KTE = q_BTHE[0].float().transpose(0, 1), k_BTKE[0].float().transpose(0, 1)
    later_TT = ~causal(length, x_BTD.device)

    for head, q_TE in enumerate(q_HTE):
        k_TE = k_KTE[head * len(k_KTE) // len(q_HTE)]
        scores_TT = q_TE @ k_TE.T * attention.head_dim**-0.5
        yield scores_TT.masked_fill_(later_TT, float("-inf")).softmax(-1)


def pool(table_TT: Tensor, rows: Sequence[int], size: int) -> list[list[float]]:
    """Return the given rows of a table, the largest value of each `size` neighbouring columns, and
    of each `size` neighbours among the rows."""
    chosen = table_TT[list(rows)]
    columns = F.max_pool1d(chosen[None], size, ceil_mode=True)[0]
    cells = F.max_pool1d(columns.T[None], size, ceil_mode=True)[0].T
    return [[round(value, 4) for value in row] for row in cells.tolist()]


Talk = tuple[Messages, str]
"""a finished conversation and the instruction its first turn begins with"""


@dataclass(frozen=True)
class Look:
    """Attention of one model to one conversation: the largest on the instruction where each answer
    begins, and the pooled map (rows: tokens of the answers; columns: all)."""

    starts: list[float]
    map: list[list[float]]


def look(
    model: Llama, tokenizer: Tokenizer, talk: Talk, context: int, most_bins: int = MOST_BINS
) -> Look:
    """Measure how `model` reads one conversation, as much of it as fits into `context`."""
    ids, answers = _tokens(tokenizer, talk, context)
    first, last = instruction_span(tokenizer, *talk)
    # row t: the position that predicts token t, the one before it
    table_TT = largest(model, ids).roll(1, dims=0)
    starts = [t for t in answers if t - 1 not in answers]

    return Look(
        [float(table_TT[t, first:last].max()) for t in starts],
        pool(table_TT, answers, _bin(ids, most_bins)),
    )


def figure(
    looks: Mapping[str, Sequence[Look]],
    tokenizer: Tokenizer,
    talks: Sequence[Talk],
    context: int,
    most_bins: int = MOST_BINS,
) -> dict[str, Any]:
    """Return Figure 10 from what several models made of the same conversations: over all of them,
    by turn, how much the position that begins each answer looks at the instruction; and the maps of
    the conversation on which the last model differs most from the first."""
    names = list(looks)
    differences = [
        sum(after.starts) - sum(before.starts)
        for after, before in zip(looks[names[-1]], looks[names[0]])
    ]
    shown = differences.index(max(differences))
    ids, _ = _tokens(tokenizer, talks[shown], context)
    first, last = instruction_span(tokenizer, *talks[shown])
    size = _bin(ids, most_bins)

    return {
        "names": names,
        "dialogs": len(talks),
        "instruction_by_turn": {name: _mean_by_turn(looks[name]) for name in names},
        "maps": {name: looks[name][shown].map for name in names},
        "bin": size,
        "instruction": talks[shown][1],
        "instruction_bins": [first / size, last / size],
        "columns": [tokenizer.decode(ids[i : i + size]).strip() for i in range(0, len(ids), size)],
    }


def _tokens(tokenizer: Tokenizer, talk: Talk, context: int) -> tuple[list[int], list[int]]:
    """The first `context` ids of a conversation, and the positions of its answers."""
    ids, mask = encode_dialog(tokenizer, talk[0])
    return ids[:context], [t for t, trained in enumerate(mask[:context]) if trained]


def _bin(ids: Sequence[int], most_bins: int) -> int:
    """Neighbouring tokens that share one bin."""
    return max(1, -(-len(ids) // most_bins))


def _mean_by_turn(looks: Sequence[Look]) -> list[float]:
    """The mean of each turn over the conversations that have it."""
    turns = zip_longest(*(look.starts for look in looks))
    return [statistics.fmean(v for v in turn if v is not None) for turn in turns]


def instruction_span(tokenizer: Tokenizer, talk: Messages, instruction: str) -> tuple[int, int]:
    """Return the token positions [first, last) of the instruction, which opens the first turn."""
    opening = encode_prompt(tokenizer, talk[: 2 if talk[0].role == "system" else 1])
    ends, text = [], ""
    for part in tokenizer.stream(opening):
        text += part
        ends.append(len(text))

    begin = text.find(instruction)
    if begin < 0:
        raise ValueError("the first turn does not hold the instruction")

    first = next(t for t, end in enumerate(ends) if end > begin)
    last = next(t for t, end in enumerate(ends) if end >= begin + len(instruction))
    return first, last + 1
