"""A model, data and an objective small enough to train in milliseconds."""

from __future__ import annotations

import torch

from llama2.model.llama import Llama, LlamaConfig
from llama2.ranks import Ranks
from llama2.train.loop import Loss
from llama2.train.objectives import next_token

VOCABULARY = 37
CONFIG = LlamaConfig(
    vocab_size=VOCABULARY,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=32,
)


def llama(seed: int = 0) -> Llama:
    return Llama(CONFIG, seed)


ALONE = Ranks.alone()


class Rows:
    """`rows` random rows a step with ragged loss masks, `micro` to a micro-batch, shared between
    ranks."""

    def __init__(
        self, rows: int = 8, micro: int = 8, steps: int | None = None, ranks: Ranks = ALONE
    ) -> None:
        self.ranks = ranks
        self.rows, self.micro, self.steps, self.step = rows, micro, steps, 0

    def __next__(self):
        if self.step == self.steps:
            raise StopIteration

        self.step += 1
        generator = torch.Generator().manual_seed(self.step)
        tokens = torch.randint(VOCABULARY, (self.rows, 13), generator=generator)
        lengths = torch.randint(1, 13, (self.rows, 1), generator=generator)
        batch = {
            "tokens_BT": tokens[:, :-1],
            "targets_BT": tokens[:, 1:],
            "weights_BT": (torch.arange(12) < lengths).float(),
        }
        mine = {name: self.ranks.share(value) for name, value in batch.items()}
        parts = {name: value.split(self.micro) for name, value in mine.items()}

        return [dict(zip(parts, row)) for row in zip(*parts.values()) if len(row[0])]

    def state_dict(self):
        return {"step": self.step}

    def load_state_dict(self, state):
        self.step = state["step"]


def noisy(model, batch) -> Loss:
    """Next-token loss with a random weight on each target: training that depends on PyTorch's
    random generator."""
    loss = next_token(
        model, batch | {"weights_BT": batch["weights_BT"] * torch.rand(batch["weights_BT"].shape)}
    )
    loss.metrics["squared"] = loss.total.detach() ** 2
    return loss


def weights(model) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}
