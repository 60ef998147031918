"""Positions of tokens: rotary tables and rotations (§2.2), which position may look where, packed
documents, and answers that share one prompt.

A row of *branches* holds a prompt, marked 0, and behind it answers to it, marked 1, 2, ...: each
answer sees the prompt and itself, at the positions it would have right behind the prompt.

Shapes: B rows, T positions, H heads, E head dimension.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llama2.model.rope import RopeScaling, rotary_angles


def rotary_tables(
    positions_BT: Tensor, head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> tuple[Tensor, Tensor]:
    """cos and sin of position / theta^(2 i / head_dim), scaled if the model does, in fp32,
    [B, T, 1, head_dim], for `rotate`: both halves of a head hold the same angles, and the sine is
    negated in the first."""
    angles_BT1E = rotary_angles(positions_BT, head_dim, theta, scaling)[:, :, None]
    cos, sin = angles_BT1E.cos(), angles_BT1E.sin()
    if scaling is not None and scaling.amplitude != 1:
        cos, sin = cos * scaling.amplitude, sin * scaling.amplitude

    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x_BTHE: Tensor, cos_BT1E: Tensor, sin_BT1E: Tensor) -> Tensor:
    """Rotate dimension i of each head with dimension i + head_dim / 2 by the angle of its position,
    in fp32."""
    x = x_BTHE.float()
    swapped = x.roll(x.shape[-1] // 2, dims=-1)
    return (x * cos_BT1E).add_(swapped.mul_(sin_BT1E)).to(x_BTHE.dtype)


def causal(length: int, device: torch.device) -> Tensor:
    """[T, T], True where a position may look: at itself and at what came before."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


def same_document(documents_BT: Tensor) -> Tensor:
    """[B, T, T], True where a position may look: at itself and at earlier positions of its
    document."""
    same_BTT = documents_BT[:, :, None] == documents_BT[:, None, :]
    return same_BTT & causal(documents_BT.shape[1], documents_BT.device)


def document_starts(documents_BT: Tensor) -> Tensor:
    """The first position of each token's document (documents are runs of one id)."""
    index_T = torch.arange(documents_BT.shape[1], device=documents_BT.device)
    changes_BT = F.pad(documents_BT[:, 1:] != documents_BT[:, :-1], (1, 0), value=False)
    return torch.where(changes_BT, index_T, 0).cummax(dim=1).values


def positions_within(documents_BT: Tensor) -> Tensor:
    """The position of each token inside its document."""
    return torch.arange(documents_BT.shape[1], device=documents_BT.device) - document_starts(
        documents_BT
    )


def same_branch(branches_BT: Tensor) -> Tensor:
    """[B, T, T], True where a position may look: at itself and at earlier positions of the prompt
    and of its own answer."""
    same_BTT = branches_BT[:, :, None] == branches_BT[:, None, :]
    visible_BTT = same_BTT | (branches_BT == 0)[:, None, :]
    return visible_BTT & causal(branches_BT.shape[1], branches_BT.device)


def branch_gaps(branches_BT: Tensor) -> Tensor:
    """The positions that each token may not see, [B, T, 2], begin and end: from the end of the
    prompt to the beginning of its own answer; nothing for the prompt, where the end is 0."""
    prompt_B1 = (branches_BT == 0).sum(1, keepdim=True)
    starts_BT = document_starts(branches_BT)
    return torch.stack((prompt_B1.expand_as(starts_BT), starts_BT), dim=-1).contiguous()


def positions_along(branches_BT: Tensor) -> Tensor:
    """The position of each token in the conversation of its own branch."""
    index_T = torch.arange(branches_BT.shape[1], device=branches_BT.device)
    prompt_BT, start_BT = branch_gaps(branches_BT).unbind(-1)
    return torch.where(branches_BT == 0, index_T, prompt_BT + index_T - start_BT)
