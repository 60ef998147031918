"""The trunk of the language model with a scalar head (§3.2.2): reward models, and the critic of PPO
(§3.2.3).

The paper replaces the head that predicts tokens by a regression head with one output. Names are
those of Hugging Face's `LlamaForSequenceClassification` with one label. Shapes: B rows, T
positions, D hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llama2.model.linear import Linear
from llama2.model.llama import LlamaConfig, Trunk, initialise


class ScalarHead(Linear):
    """A regression head. Not a bf16 product: two answers may differ by less than its rounding."""

    def __init__(self, inputs: int) -> None:
        super().__init__(inputs, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return one number in fp32 for each vector, [..., 1] of [..., D]."""
        return (hidden.float() * self.weight[0].float()).sum(-1, keepdim=True)


class Scorer(nn.Module):
    """One number for a row, read at its last token, or one for every token. Weights are drawn from
    `seed`."""

    def __init__(self, config: LlamaConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        self.score = ScalarHead(config.hidden_size)
        initialise(self, seed)

    def forward(
        self,
        tokens_BT: Tensor,
        *,
        lengths_B: Tensor | None = None,
        branches_BT: Tensor | None = None,
        ends_BK: Tensor | None = None,
    ) -> Tensor:
        """Return scores [B] in fp32 at the last real token of each right-padded row (position
        lengths_B - 1); without lengths, values [B, T] at every token. What stands after a row's
        length cannot matter: attention is causal.

        Where a row holds a prompt and K answers to it (branches_BT, see `positions`), return
        scores [B, K] at the last token of each, ends_BK.
        """
        hidden: Tensor = self.model(tokens_BT, branches_BT=branches_BT)
        if ends_BK is not None:
            rows_B1 = torch.arange(len(hidden), device=hidden.device)[:, None]
            hidden = hidden[rows_B1, ends_BK]
        elif lengths_B is not None:
            hidden = hidden[torch.arange(len(hidden), device=hidden.device), lengths_B - 1]

        scores: Tensor = self.score(hidden)
        return scores[..., 0]
