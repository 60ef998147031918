"""Copies of a model that hold other weights than it, with everything that was put into it:
wrappers, hooks and subclasses.
"""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import nn

from llama2.model.linear import is_hooked

Module = TypeVar("Module", bound=nn.Module)


def empty_copy(model: Module, dtype: torch.dtype) -> Module:
    """Return the modules of `model` over parameters of type `dtype` that are frozen and not yet
    filled. At no time are the weights there twice."""
    empty: dict[int, object] = {
        id(weight): nn.Parameter(torch.empty_like(weight, dtype=dtype), requires_grad=False)
        for weight in model.parameters()
    }
    return copy.deepcopy(model, empty).to(dtype)


def structure(model: nn.Module) -> list[tuple[int, type[nn.Module], list[int]]]:
    """Return what changes when a module of `model` is replaced, wrapped or hooked: each module, its
    class and its hooks."""
    return [(id(module), type(module), _hooks(module)) for module in model.modules()]


def _hooks(module: nn.Module) -> list[int]:
    """The numbers of a module's hooks, and of a `forward` of its own."""
    if not is_hooked(module):
        return []

    return [
        *module._forward_hooks,
        *module._forward_pre_hooks,
        *module._backward_hooks,
        *module._backward_pre_hooks,
        id(module.__dict__.get("forward")),
    ]
