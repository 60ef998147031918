"""The heat map of Figure 10 (§3.3): how much a model looks back at the instruction of the first
turn.

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
from typing import Any

import torch
from torch import Tensor, nn

from llama2.model.llama import Attention, Context, Llama
from llama2.model.positions import causal, rotate
from llama2.records import Messages
from llama2.tokenizer.template import encode_dialog, encode_prompt
from llama2.tokenizer.tokenizer import Tokenizer

MOST_BINS = 72


@torch.no_grad()
def largest(model: Llama, tokens: Sequence[int]) -> Tensor:
    """The largest attention weight over layers and heads, [T, T] in fp32 on the CPU: row t looks at
    column s <= t."""
    length = len(tokens)
    device = next(model.parameters()).device
    top_TT = torch.zeros(length, length, device=device)

    def watch(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        assert isinstance(module, Attention)
        for weights_TT in weights(module, *arguments):
            torch.maximum(top_TT, weights_TT, out=top_TT)

    handles = [
        module.register_forward_pre_hook(watch)
        for module in model.modules()
        if isinstance(module, Attention)
    ]
    try:
        model(torch.tensor([list(tokens)], device=device), head=False)
    finally:
        for handle in handles:
            handle.remove()

    return top_TT.cpu()


def weights(attention: Attention, x_BTD: Tensor, context: Context) -> Iterator[Tensor]:
    """softmax(q k / sqrt(E)) of one row under the causal mask, [T, T] in fp32, head after head: all
    of them at once would be the largest tensor of an evaluation."""
    rows, length, _ = x_BTD.shape
    q_HTE, k_KTE = (
        rotate(
            project(x_BTD).view(rows, length, -1, attention.head_dim),
            context.cos_BT1E,
            context.sin_BT1E,
        )[0]
        .float()
        .transpose(0, 1)
        for project in (attention.q_proj, attention.k_proj)
    )
    later_TT = ~causal(length, x_BTD.device)

    for head, q_TE in enumerate(q_HTE):
        k_TE = k_KTE[head * len(k_KTE) // len(q_HTE)]
        scores_TT = q_TE @ k_TE.T * attention.head_dim**-0.5
        yield scores_TT.masked_fill_(later_TT, float("-inf")).softmax(-1)


def binned(table_TT: Tensor, rows: Sequence[int], size: int) -> list[list[float]]:
    """The given rows of a table, the largest value of each `size` neighbouring columns, rows in
    runs of `size` too."""
    chosen = table_TT[list(rows)]
    columns = torch.nn.functional.max_pool1d(chosen[None], size, ceil_mode=True)[0]
    both = torch.nn.functional.max_pool1d(columns.T[None], size, ceil_mode=True)[0].T

    return [[round(value, 4) for value in row] for row in both.tolist()]


Talk = tuple[Messages, str]
"""a finished conversation and the instruction its first turn begins with"""


@dataclass(frozen=True)
class Look:
    """How one model reads one conversation: the largest attention on the instruction where each
    answer begins, and the binned map (rows: tokens of the answers; columns: all)."""

    starts: list[float]
    map: list[list[float]]


def look(
    model: Llama, tokenizer: Tokenizer, talk: Talk, context: int, most_bins: int = MOST_BINS
) -> Look:
    """One conversation as `model` reads it, as much of it as fits into `context`."""
    ids, answers = _tokens(tokenizer, talk, context)
    first, last = instruction_span(tokenizer, *talk)
    table_TT = _predicting(model, ids)

    return Look(
        [float(table_TT[turn[0], first:last].max()) for turn in _turns(answers)],
        binned(table_TT, answers, _bin(ids, most_bins)),
    )


def figure(
    looks: Mapping[str, Sequence[Look]],
    tokenizer: Tokenizer,
    talks: Sequence[Talk],
    context: int,
    most_bins: int = MOST_BINS,
) -> dict[str, Any]:
    """Figure 10 from what several models made of the same conversations: over all of them, how much
    the position that begins each answer looks at the instruction, by turn; and of the one on which
    the last model differs most from the first, the maps.
    """
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
        "instruction_by_turn": {
            name: _mean_by_turn([one.starts for one in mine]) for name, mine in looks.items()
        },
        "maps": {name: mine[shown].map for name, mine in looks.items()},
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
    """How many neighbouring tokens one bin holds."""
    return max(1, -(-len(ids) // most_bins))


def _predicting(model: Llama, ids: Sequence[int]) -> Tensor:
    """`largest`, but row t is the position that predicts token t: the one before it."""
    return largest(model, ids).roll(1, dims=0)


def _mean_by_turn(found: Sequence[Sequence[float]]) -> list[float]:
    turns = max(map(len, found))
    return [
        statistics.fmean(one[turn] for one in found if turn < len(one)) for turn in range(turns)
    ]


def instruction_span(tokenizer: Tokenizer, talk: Messages, instruction: str) -> tuple[int, int]:
    """The token positions [first, last) of the instruction, which opens the first turn."""
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


def _turns(answers: Sequence[int]) -> list[list[int]]:
    """Runs of consecutive positions: the tokens of each answer."""
    turns: list[list[int]] = []
    for position in answers:
        if turns and position == turns[-1][-1] + 1:
            turns[-1].append(position)
        else:
            turns.append([position])

    return turns
