"""Read PyTorch's own files as they were before version 1.6: pickles and numbers one after another.

A number that marks the format, its version, facts about the machine, the state dict without its
numbers, the keys of the storages in their order, and then each storage: the count of its numbers,
and the numbers. As in `torch_zip`, nothing in the pickles is run. The format has no checksums.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import IO, Any

from llama2 import json_files
from llama2.errors import UserError, explain_os_errors
from llama2.formats import torch_zip
from llama2.formats.stored_model import StoredTensor

_BEGIN = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
_VERSION = 1001


class _Unpickler(torch_zip.TensorUnpickler):
    """Remembers the storages it meets: their sizes give the offset of each."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file)
        self.storages: dict[str, torch_zip.Storage] = {}

    def persistent_load(self, pid: Any) -> torch_zip.Storage:
        if len(pid) == 6 and pid[5] is not None:
            raise ValueError("it shares storages in a way that went out of use")

        storage = super().persistent_load(pid[:5])
        self.storages[storage.key] = storage
        return storage


def list_tensors(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors in a file of PyTorch's by name, of either format; reads no numbers yet."""
    with explain_os_errors(path), json_files.open_file(path) as file:
        if file.read(len(_BEGIN)) != _BEGIN:
            return torch_zip.list_tensors(path)

        version, machine = _read_plain(path, file), _read_plain(path, file)
        if version != _VERSION:
            raise UserError(
                f"{path}: version {version!r} of PyTorch's files is unknown", torch_zip.AGAIN
            )
        if not isinstance(machine, dict) or machine.get("little_endian") is not True:
            raise UserError(f"{path}: {torch_zip.OTHER_ORDER}", "save it again here")

        reader = _Unpickler(file)
        views = torch_zip.read_views(path, reader)
        members = _list_members(path, file, reader.storages)

    return {
        name: torch_zip.open_tensor(path, name, view, members.get(view.storage.key))
        for name, view in views.items()
    }


def _list_members(
    path: Path, file: IO[bytes], storages: dict[str, torch_zip.Storage]
) -> dict[str, torch_zip.Extent]:
    keys = _read_plain(path, file)
    at, size = file.tell(), file.seek(0, io.SEEK_END)
    if not isinstance(keys, list) or sorted(map(str, keys)) != sorted(storages):
        raise UserError(f"{path}: the list of its storages is damaged", torch_zip.AGAIN)

    members = {}
    for key in map(str, keys):
        file.seek(at)
        count = int.from_bytes(file.read(8), "little")
        members[key] = torch_zip.Extent(at + 8, storages[key].nbytes)
        at += 8 + storages[key].nbytes

        if count != storages[key].count or at > size:
            raise UserError(f"{path}: truncated in storage {key}, or damaged", torch_zip.AGAIN)

    return members


def _read_plain(path: Path, file: IO[bytes]) -> Any:
    """Read a small pickle beside the state dict: numbers, texts, and lists and dictionaries."""
    try:
        return _Unpickler(file).load()
    except Exception as error:  # a damaged pickle raises whatever the bytes happen to spell
        raise UserError(
            f"{path}: truncated or damaged ({type(error).__name__}: {error})", torch_zip.AGAIN
        ) from None
