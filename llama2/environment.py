"""Switches in the environment: what they may say, and that nothing else is taken for it."""

from __future__ import annotations

import os

from llama2.errors import UserError

_ON, _OFF = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


def is_on(name: str, *, default: bool) -> bool:
    """Tell whether the variable `name` says yes, `default` where it is not set or empty; UserError
    for what says neither."""
    text = os.environ.get(name, "").strip().lower()
    if text and text not in (*_ON, *_OFF):
        raise UserError(
            f"{name}={os.environ[name]}: it says neither yes nor no", "set it to 1 or 0"
        )

    return text in _ON if text else default


def wants_native() -> bool:
    """Tell whether our own kernels in C++ are wanted (LLAMA2_NATIVE): they round other than
    PyTorch's operations do."""
    return is_on("LLAMA2_NATIVE", default=True)


def wants_graphs() -> bool:
    """Tell whether decoding steps on a GPU may be recorded as CUDA graphs (LLAMA2_CUDA_GRAPHS)."""
    return is_on("LLAMA2_CUDA_GRAPHS", default=True)
