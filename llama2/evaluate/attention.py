"""The heat map of Figure 10 (§3.3): how much a model looks back at the instruction of the first turn.

For every answer token the largest attention over all layers and heads on each earlier token, neighbouring tokens
binned. Fused kernels never form the attention weights, so they are computed again here from queries and keys, which
a hook on each attention module provides; the model's code stays as it is.

Shapes: B = 1 row, T positions, H query heads, K key heads, G = H / K, E head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
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


def compare(models: dict[str, Llama], tokenizer: Tokenizer, talk: Messages, instruction: str,
            most_bins: int = 72) -> dict[str, Any]:
    """Figure 10 for several models on one conversation whose first turn begins with `instruction`.

    Returns the binned map of each model (rows: tokens of all answers; columns: all tokens), its mean attention on the
    instruction by turn, and what labels the picture.
    """
    ids, mask = encode_dialog(tokenizer, talk)
    context = min(model.config.max_position_embeddings for model in models.values())
    ids, mask = ids[:context], mask[:context]
    first, last = instruction_span(tokenizer, talk, instruction)
    answers = [t for t, trained in enumerate(mask) if trained]
    size = max(1, -(-len(ids) // most_bins))
    turns = _turns(answers)
    described: dict[str, Any] = {}
    for name, model in models.items():
        # Attention of the position that predicts an answer token: the one before it.
        table_TT = largest(model, ids).roll(1, dims=0)
        described[name] = {
            "map": binned(table_TT, answers, size),
            "instruction_by_turn": [float(table_TT[turn, first:last].amax(-1).mean()) for turn in turns]}
    return {"names": list(models), "models": described, "bin": size, "instruction": instruction,
            "instruction_bins": [first / size, last / size],
            "columns": [tokenizer.decode(ids[i: i + size]).strip() for i in range(0, len(ids), size)],
            "turn_rows": [answers.index(turn[0]) / size for turn in turns]}


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
