"""PyTorch's own files as they were before version 1.6: no zip archive, but pickles and numbers one
after another.

A number that marks the format, its version, facts about the machine, the state dict without its
numbers, the keys of the storages in the order in which they follow, and then each storage: how many
numbers, and the numbers. What is said in `archive` of pickles holds here too: nothing in them is
run. The format has no checksums.
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


class _Reader(torch_zip.Reader):
    """Remembers the storages it meets, for their sizes tell where each begins."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file)
        self.storages: dict[str, torch_zip.Storage] = {}

    def persistent_load(self, pid: Any) -> torch_zip.Storage:
        if len(pid) == 6 and pid[5] is not None:
            raise ValueError("it shares storages in a way that went out of use")

        storage = super().persistent_load(pid[:5])
        self.storages[storage.key] = storage
        return storage


def either(path: Path) -> dict[str, StoredTensor]:
    """The tensors in a file of PyTorch's by name, as it writes them now or wrote them then."""
    return entries(path) if is_one(path) else torch_zip.entries(path)


def is_one(path: Path) -> bool:
    """Whether a file has this format."""
    with explain_os_errors(path), json_files.opened(path) as file:
        return file.read(len(_BEGIN)) == _BEGIN


def entries(path: Path) -> dict[str, StoredTensor]:
    """The tensors in a file by name, as `archive.entries`; reads no numbers yet."""
    with explain_os_errors(path), open(path, "rb") as file:
        file.seek(len(_BEGIN))
        version, machine = _plain(path, file), _plain(path, file)
        if version != _VERSION:
            raise UserError(
                f"{path}: version {version!r} of PyTorch's files is unknown", torch_zip.AGAIN
            )
        if not isinstance(machine, dict) or machine.get("little_endian") is not True:
            raise UserError(
                f"{path}: its numbers have another byte order than this machine",
                "save it again here",
            )

        reader = _Reader(file)
        views = torch_zip.described(path, reader)
        members = _members(path, file, reader.storages)

    return {
        name: torch_zip.stored(path, name, view, members.get(view.storage.key))
        for name, view in views.items()
    }


def _members(
    path: Path, file: IO[bytes], storages: dict[str, torch_zip.Storage]
) -> dict[str, torch_zip.Member]:
    keys = _plain(path, file)
    place, size = file.tell(), file.seek(0, io.SEEK_END)
    if not isinstance(keys, list) or sorted(map(str, keys)) != sorted(storages):
        raise UserError(f"{path}: the list of its storages is damaged", torch_zip.AGAIN)

    found = {}
    for key in map(str, keys):
        file.seek(place)
        count, length = (
            int.from_bytes(file.read(8), "little"),
            storages[key].count * storages[key].dtype.itemsize,
        )
        if count != storages[key].count or place + 8 + length > size:
            raise UserError(f"{path}: truncated in storage {key}, or damaged", torch_zip.AGAIN)

        found[key] = torch_zip.Member(place + 8, length)
        place += 8 + length

    return found


def _plain(path: Path, file: IO[bytes]) -> Any:
    """One of the small pickles around the state dict: numbers, texts, lists and dictionaries of
    them."""
    try:
        return _Reader(file).load()
    except Exception as error:  # a damaged pickle raises whatever the bytes happen to spell
        raise UserError(
            f"{path}: truncated or damaged ({type(error).__name__}: {error})", torch_zip.AGAIN
        ) from None
