"""Matrices of the network, and whether other code may multiply with one in place of calling it."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.module import _has_any_global_hook  # as every call of a module asks


class Linear(nn.Linear):
    """A matrix, without a bias but in some of Llama 2's relatives; `initialise` fills it, not the
    constructor."""

    def __init__(self, inputs: int, outputs: int, bias: bool = False) -> None:
        super().__init__(inputs, outputs, bias=bias)

    def reset_parameters(self) -> None:
        """Leave the weights as they are."""


class Embedding(nn.Embedding):
    """Token embeddings; `initialise` fills them, not the constructor."""

    def reset_parameters(self) -> None:
        """Leave the weights as they are."""


def is_bare(*projections: nn.Module) -> bool:
    """Tell whether these modules do nothing but multiply with their weights, so that other code may
    do so in their place. A subclass, a wrapper, a bias and a hook say no: they must be called."""
    return all(
        type(module) is Linear and getattr(module, "bias", None) is None and not is_hooked(module)
        for module in projections
    )


def is_hooked(module: nn.Module) -> bool:
    """Tell whether more happens when a module is called than its class says: hooks of any kind, or
    a `forward` of its own."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or _has_any_global_hook()  # type: ignore[no-untyped-call]
    )
