"""Models and batches of the tests on a GPU: large enough for its fused kernels, small enough for a
CPU beside it."""

from __future__ import annotations

import os

import torch
from torch import Tensor, nn

from llama2.kernels import install
from llama2.model.llama import Llama, LlamaConfig

TINY = os.environ.get("LLAMA2_GPU_TINY") == "1"
VOCABULARY, WIDTH = 512, 64 if TINY else 256
# lengths, row by row
DOCUMENTS = ((20, 1, 30), (51,), (16, 16, 19)) if TINY else ((90, 1, 112), (203,), (64, 64, 75))
LENGTH = sum(DOCUMENTS[0])  # no kernel likes it


def build(kv_heads: int = 2, seed: int = 0, scale: float = 4.0) -> Llama:
    """Weights four times the usual, so that a wrong mask or position shows."""
    model = Llama(LlamaConfig(VOCABULARY, WIDTH, WIDTH * 3 // 2, 3, 4, kv_heads, 256), seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale if parameter.dim() == 2 else 1)

    return install(model)


def batch(packed: bool = True, seed: int = 0) -> dict[str, Tensor]:
    """Rows of random tokens and targets; packed ones with their documents."""
    random = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, VOCABULARY, (len(DOCUMENTS), LENGTH + 1), generator=random)
    found = {
        "tokens_BT": tokens[:, :-1].contiguous(),
        "targets_BT": tokens[:, 1:].contiguous(),
        "weights_BT": (torch.rand(len(DOCUMENTS), LENGTH, generator=random) < 0.8).float(),
    }

    if packed:
        found["documents_BT"] = torch.stack(
            [
                torch.cat([torch.full((length,), number) for number, length in enumerate(row)])
                for row in DOCUMENTS
            ]
        )

    return found


def moved(tensors: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def results(
    model: nn.Module, data: dict[str, Tensor], device: torch.device, bf16: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probabilities and gradients of a model on a device, returned on the CPU in fp32."""
    model, data = model.to(device), moved(data, device)
    model.zero_grad(set_to_none=True)
    extra = {"documents_BT": data["documents_BT"]} if "documents_BT" in data else {}

    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        logp_BT = model(data["tokens_BT"], targets_BT=data["targets_BT"], **extra)

    (-(logp_BT * data["weights_BT"]).sum() / data["weights_BT"].sum()).backward()
    gradients = {
        name: parameter.grad.float().cpu()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return logp_BT.detach().float().cpu(), gradients


def distance(found: Tensor, exact: Tensor) -> float:
    """Of two tensors, relative to the second: |found - exact| / |exact|."""
    return float((found - exact).norm() / exact.norm().clamp(min=1e-12))
