"""Which format a checkpoint has: looked at, not asked for."""

from __future__ import annotations

import struct
from pathlib import Path

import torch

from llama2 import json_files
from llama2.errors import UserError, explain_os_errors
from llama2.formats import gguf, hf, llama2c, meta, peft
from llama2.formats.hf_directory import CONFIG
from llama2.formats.stored_model import StoredModel

_LOOKED_FOR = (
    f"a directory with {CONFIG} (Hugging Face), {peft.CONFIG} (a PEFT adapter) or {meta.PARAMETERS} (Meta) "
    "beside its weights, a .gguf file, or a .bin file of llama2.c"
)
_LEGACY = struct.Struct("<7i")
_MOST = 1 << 26


def open_model(
    path: Path, *, base: Path | None = None, dtype: torch.dtype | None = None
) -> StoredModel:
    """The checkpoint at `path`, in whatever format it is. No tensor is read yet.

    `base` is the model that an adapter belongs to, where its own word is wrong; `dtype` is what the
    sum of both is rounded to. UserError if nothing known is there, or if it is damaged or of
    another architecture.
    """
    if path.is_dir() and (path / peft.CONFIG).exists():
        place = peft.base_of(path, base)
        if place.is_dir() and (place / peft.CONFIG).exists():
            raise UserError(
                f"{place}: this is an adapter, too; a base is a whole model", "give --base"
            )

        return peft.read(path, open_model(place), dtype)

    if base is not None:
        raise UserError(
            f"{path}: only an adapter has a base, and there is no {peft.CONFIG}", "leave out --base"
        )

    return _directory(path) if path.is_dir() else _file(path)


def _directory(path: Path) -> StoredModel:
    if (path / CONFIG).exists():
        return hf.read(path)
    if (path / meta.PARAMETERS).exists():
        return meta.read(path)

    ours = sorted(file.name for file in path.iterdir() if file.suffix == ".gguf")
    held = f", though {ours[0]} is in it" if ours else ""
    raise UserError(
        f"{path}: no checkpoint{held}",
        f"give the file itself: {path / ours[0]}" if ours else f"looked for {_LOOKED_FOR}",
    )


def _file(path: Path) -> StoredModel:
    with explain_os_errors(path), json_files.opened(path) as file:
        begin = file.read(_LEGACY.size)

    if begin[:4] == b"GGUF":
        return gguf.read(path)
    if begin[:4] == struct.pack("<I", llama2c.MAGIC) or _plausible(begin):
        return llama2c.read(path)
    if path.suffix in (".safetensors", ".pth", ".bin", ".json"):
        raise UserError(
            f"{path}: one file of a checkpoint", f"give the directory it lies in: {path.parent}"
        )

    raise UserError(f"{path}: no checkpoint", f"looked for {_LOOKED_FOR}")


def _plausible(begin: bytes) -> bool:
    """Whether a file may begin with the seven numbers of llama2.c's first format, which has no mark
    of its own."""
    if len(begin) < _LEGACY.size:
        return False

    width, inner, layers, heads, kv_heads, vocabulary, context = _LEGACY.unpack(begin)
    if not all(
        0 < number < _MOST
        for number in (width, inner, layers, heads, kv_heads, abs(vocabulary), context)
    ):
        return False

    return not (width % heads or heads % kv_heads)
