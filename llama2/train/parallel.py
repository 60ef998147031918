"""Data parallelism, applied from outside: the model knows nothing of ranks.

`replicate` keeps a copy on every rank and sums gradients in one flattened all-reduce; `shard`
spreads parameters, gradients and optimizer state with FSDP2. Both *sum* gradients over ranks; the
loop divides once by the global weight, so two ranks train exactly what one would. Sampling from a
sharded model does not run through it: the paper found that about twenty times slower (§3.2.3), so
`generate.engine` gathers the weights once a call.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from llama2.devices import Precision
from llama2.ranks import Ranks

_FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
_SPREAD = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)


def replicate(model: nn.Module, ranks: Ranks) -> nn.Module:
    """Copy rank 0's parameters and buffers to every rank. For models whose training state fits one
    device."""
    if ranks.size > 1:
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                dist.broadcast(tensor, src=0)

    return model


def shard(
    model: nn.Module,
    ranks: Ranks,
    precision: Precision = "fp32",
    reshard_after_forward: bool = True,
) -> nn.Module:
    """Spread `model` over all ranks with FSDP2, in place, on their devices; make the optimizer
    afterwards.

    The weights are rank 0's, which may lie in main memory; of the other ranks nothing but the shape
    is used, so they may hold tensors of the meta device. No device ever holds the whole model.

    Each member of a `ModuleList` (a transformer block) is one unit, the rest is the root. With bf16
    the weights are gathered in bf16 and gradients are summed in fp32; the master weights stay as
    they are. Outside torchrun the model only moves to its device. `reshard_after_forward=False`
    keeps the gathered blocks for the backward pass: faster, more memory.
    """
    axis = ranks.spread().shard
    if axis.group is None:
        return model.to(ranks.device)

    weights = model.state_dict() if ranks.is_main else {}
    model.to("meta")
    kinds = {"fp32": (None, None), "bf16": (torch.bfloat16, torch.float32)}[precision]
    # inputs stay as they are: the rotary tables that blocks are handed must not be rounded
    policy = MixedPrecisionPolicy(*kinds, cast_forward_inputs=False)
    mesh = init_device_mesh(ranks.device.type, (axis.size,), mesh_dim_names=("shard",))
    blocks = [
        block for module in model.modules() if isinstance(module, nn.ModuleList) for block in module
    ]

    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward)

    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward)
    # FSDP2 warns that in-place changes of a model's output would lose gradients; no objective makes
    # any.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    for unit in model.modules():
        if isinstance(unit, FSDPModule):
            unit.set_gradient_divide_factor(1.0)
            # the pre-multiplied sum taken otherwise exists only in NCCL
            unit.set_force_sum_reduction_for_comms(True)

    model.to_empty(device=ranks.device)
    set_model_state_dict(model, weights, options=_SPREAD)
    return model


def is_sharded(model: nn.Module) -> bool:
    """Tell whether `shard` has spread this model (or a part of it)."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def sum_gradients(model: nn.Module, ranks: Ranks) -> None:
    """Sum gradients over ranks, in one all-reduce per data type. FSDP2 has done so in its backward
    pass already."""
    if ranks.data.size == 1 or is_sharded(model):
        return

    gradients: dict[torch.dtype, list[Tensor]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            if parameter.grad is None:  # this rank had no micro-batch that reached it
                parameter.grad = torch.zeros_like(parameter)

            gradients.setdefault(parameter.grad.dtype, []).append(parameter.grad)

    for parts in gradients.values():
        flat = ranks.all_sum(torch.cat([part.reshape(-1) for part in parts]))
        chunks = torch.split(flat, [part.numel() for part in parts])
        torch._foreach_copy_(parts, [chunk.view_as(part) for chunk, part in zip(chunks, parts)])


def measure_norm(gradients: Sequence[Tensor]) -> float:
    """Return the 2-norm of all gradients taken together, over all ranks."""
    norm = torch.nn.utils.get_total_norm(gradients)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def gather_weights(model: nn.Module) -> dict[str, Any]:
    """Return the whole state dict of a model; of a sharded one on rank 0 only, {} elsewhere. All
    ranks call it."""
    return get_model_state_dict(model, options=_FULL) if is_sharded(model) else model.state_dict()


def gather_state(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return whole state dicts of model and optimizer; of a sharded model on rank 0 only, {}
    elsewhere. All ranks call it."""
    if not is_sharded(model):
        return model.state_dict(), optimizer.state_dict()

    return get_model_state_dict(model, options=_FULL), get_optimizer_state_dict(
        model, optimizer, options=_FULL
    )


def scatter_state(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    model_state: dict[str, Any],
    optimizer_state: dict[str, Any],
) -> None:
    """Restore what `gather_state` returned; for a sharded model rank 0's dicts are spread over the
    ranks."""
    if not is_sharded(model):
        model.load_state_dict(model_state)
        optimizer.load_state_dict(optimizer_state)
        return

    set_model_state_dict(model, dict(model_state), options=_SPREAD)
    set_optimizer_state_dict(model, optimizer, optimizer_state, options=_SPREAD)
