"""The heat map of Figure 10 (§3.3): how much a model looks back at the instruction of the first turn.

For every answer token the largest attention over all layers and heads on each earlier token, neighbouring tokens
binned. Fused kernels never form the attention weights, so they are computed again here from queries and keys, which
a hook on each attention module provides; the model's code stays as it is.

Shapes: B = 1 row, T positions, H query heads, K key heads, G = H / K, E head dimension.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llama2.model.llama import Attention, Context, Llama, causal, rotate
from llama2.records import Messages
from llama2.tokenizer.template import encode_dialog, encode_prompt
from llama2.tokenizer.tokenizer import Tokenizer


@torch.no_grad()
def largest(model: Llama, tokens: Sequence[int]) -> Tensor:
    """The largest attention weight over layers and heads, [T, T] in fp32 on the CPU: row t looks at column s <= t."""
    length = len(tokens)
    device = next(model.parameters()).device
    top_TT = torch.zeros(length, length, device=device)

    def look(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        assert isinstance(module, Attention)
        torch.maximum(top_TT, weights(module, *arguments).amax(0), out=top_TT)

    handles = [module.register_forward_pre_hook(look) for module in model.modules() if isinstance(module, Attention)]
    try:
        model(torch.tensor([list(tokens)], device=device), head=False)
    finally:
        for handle in handles:
            handle.remove()
    return top_TT.cpu()


def weights(attention: Attention, x_BTD: Tensor, context: Context) -> Tensor:
    """softmax(q k / sqrt(E)) of one row under the causal mask, [H, T, T] in fp32."""
    rows, length, _ = x_BTD.shape
    q_THE, k_TKE = (
        rotate(project(x_BTD).view(rows, length, -1, attention.head_dim), context)[0].float()
        for project in (attention.q_proj, attention.k_proj)
    )
    k_THE = k_TKE.repeat_interleave(q_THE.shape[1] // k_TKE.shape[1], dim=1)
    scores_HTT = torch.einsum("the,she->hts", q_THE, k_THE) * attention.head_dim**-0.5
    weights_HTT: Tensor = scores_HTT.masked_fill(~causal(length, x_BTD.device), float("-inf")).softmax(-1)
    return weights_HTT


def binned(table_TT: Tensor, rows: Sequence[int], size: int) -> list[list[float]]:
    """The given rows of a table, the largest value of each `size` neighbouring columns, rows in runs of `size` too."""
    chosen = table_TT[list(rows)]
    columns = torch.nn.functional.max_pool1d(chosen[None], size, ceil_mode=True)[0]
    both = torch.nn.functional.max_pool1d(columns.T[None], size, ceil_mode=True)[0].T
    return [[round(value, 4) for value in row] for row in both.tolist()]


Talk = tuple[Messages, str]
"""a finished conversation and the instruction its first turn begins with"""


def compare(models: Mapping[str, Llama], tokenizer: Tokenizer, talks: Sequence[Talk],
            most_bins: int = 72) -> dict[str, Any]:
    """Figure 10 for several models: over all conversations, how much the position that begins each answer looks at the
    instruction, by turn; and of the conversation on which the last model differs most from the first, the map.
    """
    starts = {name: [_at_starts(model, tokenizer, talk) for talk in talks] for name, model in models.items()}
    first, *_, last = starts.values() if len(starts) > 1 else (*starts.values(), *starts.values())
    differences = [sum(a) - sum(b) for a, b in zip(last, first)]
    shown = talks[differences.index(max(differences))]
    return {"names": list(models), "dialogs": len(talks),
            "instruction_by_turn": {name: _mean_by_turn(found) for name, found in starts.items()},
            **picture(models, tokenizer, shown, most_bins)}


def picture(models: Mapping[str, Llama], tokenizer: Tokenizer, talk: Talk, most_bins: int) -> dict[str, Any]:
    """The binned map of each model on one conversation (rows: tokens of the answers; columns: all), and its labels."""
    ids, answers = _tokens(models, tokenizer, talk)
    first, last = instruction_span(tokenizer, *talk)
    size = max(1, -(-len(ids) // most_bins))
    return {"maps": {name: binned(_predicting(model, ids), answers, size) for name, model in models.items()},
            "bin": size, "instruction": talk[1], "instruction_bins": [first / size, last / size],
            "columns": [tokenizer.decode(ids[i: i + size]).strip() for i in range(0, len(ids), size)]}


def _tokens(models: Mapping[str, Llama], tokenizer: Tokenizer, talk: Talk) -> tuple[list[int], list[int]]:
    """Ids of a conversation, as many as all models can read, and the positions of its answers."""
    context = min(model.config.max_position_embeddings for model in models.values())
    ids, mask = encode_dialog(tokenizer, talk[0])
    return ids[:context], [t for t, trained in enumerate(mask[:context]) if trained]


def _predicting(model: Llama, ids: Sequence[int]) -> Tensor:
    """`largest`, but row t is the position that predicts token t: the one before it."""
    return largest(model, ids).roll(1, dims=0)


def _at_starts(model: Llama, tokenizer: Tokenizer, talk: Talk) -> list[float]:
    """The largest attention on the instruction where each answer begins."""
    ids, answers = _tokens({"": model}, tokenizer, talk)
    first, last = instruction_span(tokenizer, *talk)
    table_TT = _predicting(model, ids)
    return [float(table_TT[turn[0], first:last].max()) for turn in _turns(answers)]


def _mean_by_turn(found: Sequence[Sequence[float]]) -> list[float]:
    turns = max(map(len, found))
    return [statistics.fmean(one[turn] for one in found if turn < len(one)) for turn in range(turns)]


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
