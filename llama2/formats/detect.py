"""Recognise the format of a checkpoint, and open it."""

from __future__ import annotations

from pathlib import Path

import torch

from llama2 import json_files
from llama2.errors import UserError, explain_os_errors
from llama2.formats import gguf, gguf_header, hf, llama2c, meta, peft
from llama2.formats.hf_directory import CONFIG
from llama2.formats.stored_model import Kinds, StoredModel

_LOOKED_FOR = (
    f"looked for a directory with {CONFIG} (Hugging Face), {peft.CONFIG} (a PEFT adapter) or "
    f"{meta.PARAMETERS} (Meta) beside its weights, a .gguf file, or a .bin file of llama2.c"
)
_HEAD = 256  # bytes that tell the format of a file
_PARTS = (".safetensors", ".pth", ".bin", ".json")


def open_model(
    path: Path, *, base: Path | None = None, dtype: torch.dtype | None = None
) -> StoredModel:
    """Open the checkpoint at `path`, of whatever format. Reads no tensor yet.

    `base` is the model that an adapter belongs to, where its own config is wrong; `dtype` is what
    the sum of both is rounded to, and the numbers of quantized tensors. UserError if nothing known
    is there, or if it is damaged or of another architecture.
    """
    if path.is_dir() and (path / peft.CONFIG).exists():
        place = peft.find_base(path, base)
        if place.is_dir() and (place / peft.CONFIG).exists():
            raise UserError(
                f"{place}: this is an adapter, too; a base is a whole model", "give --base"
            )

        return peft.read(path, open_model(place), dtype)

    if base is not None:
        raise UserError(
            f"{path}: only an adapter has a base, and there is no {peft.CONFIG}", "leave out --base"
        )

    return _open_directory(path) if path.is_dir() else open_file(path, dtype or torch.float32)


def _open_directory(path: Path) -> StoredModel:
    if (path / CONFIG).exists():
        return hf.read(path)
    if (path / meta.PARAMETERS).exists():
        return meta.read(path)

    files = sorted(path.glob("*.gguf"))
    if files:
        raise UserError(
            f"{path}: no checkpoint, though {files[0].name} is in it",
            f"give the file itself: {files[0]}",
        )

    raise UserError(f"{path}: no checkpoint", _LOOKED_FOR)


def open_file(path: Path, dtype: Kinds = torch.float32) -> StoredModel:
    """Open a checkpoint that is one file. UserError as `open_model`."""
    with explain_os_errors(path), json_files.open_file(path) as file:
        head = file.read(_HEAD)

    if head.startswith(gguf_header.MAGIC):
        return gguf.read(path, dtype)
    if llama2c.is_model(path, head):
        return llama2c.read(path)
    if path.suffix in _PARTS:
        raise UserError(
            f"{path}: one file of a checkpoint", f"give the directory it lies in: {path.parent}"
        )

    raise UserError(f"{path}: no checkpoint", _LOOKED_FOR)
