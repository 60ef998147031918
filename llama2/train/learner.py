"""A model and its optimizer on the ranks that train it."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from llama2 import kernels, private_folders
from llama2.devices import Precision
from llama2.model.attention import leave_documents_uncompiled
from llama2.ranks import Ranks
from llama2.train import optim, parallel


class Learner:
    """A model and its optimizer, ready to be fitted on `ranks`. Apply `parallel.replicate` or
    `parallel.shard` to the model first.

    `rates` gives parts of the model (name prefixes) peak learning rates of their own. `apart` names
    parts whose gradients are clipped each by its own norm; what no prefix matches is one more part,
    called "". With `compile` the objective sees the compiled model; without a C++ compiler it stays
    eager and says so.

    `tokens` counts the real tokens read so far, over all ranks, and `trained` those of them that
    carried loss.
    """

    def __init__(
        self,
        model: nn.Module,
        ranks: Ranks,
        optimizer: optim.AdamW | None = None,
        *,
        rates: Mapping[str, float] | None = None,
        apart: Sequence[str] = (),
        precision: Precision = "fp32",
        compile: bool = False,
    ) -> None:
        self.model, self.ranks, self.precision = kernels.install(model), ranks, precision
        self.step = self.tokens = self.trained = 0
        self.optimizer = optim.build_adamw(model, optimizer or optim.AdamW(), rates)
        self.parts = optim.split_parameters(model, apart)
        self.forward: nn.Module = _compile(model, ranks) if compile else model

    def state_dict(self) -> dict[str, Any]:
        """Return model, optimizer and counts; every rank calls it, the tensors of a sharded model
        arrive on rank 0."""
        model, optimizer = parallel.gather_state(self.model, self.optimizer)
        return {
            "model": model,
            "optimizer": optimizer,
            "step": self.step,
            "tokens": self.tokens,
            "trained": self.trained,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        parallel.scatter_state(self.model, self.optimizer, state["model"], state["optimizer"])
        self.step = state["step"]
        self.tokens, self.trained = state.get("tokens", 0), state.get("trained", 0)


def _compile(model: nn.Module, ranks: Ranks) -> nn.Module:
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++")):
        if ranks.is_main:
            print(
                "no C++ compiler found: training without torch.compile (install g++ for more "
                "speed)",
                file=sys.stderr,
            )

        return model

    # What it compiles is loaded again later: from a folder of our own, not from one in /tmp that
    # anybody can guess.
    os.environ.setdefault(
        "TORCHINDUCTOR_CACHE_DIR", str(private_folders.choose_folder() / "inductor")
    )
    leave_documents_uncompiled()
    compiled: nn.Module = torch.compile(model)  # type: ignore[assignment]
    return compiled
