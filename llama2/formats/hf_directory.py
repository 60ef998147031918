"""The files of a checkpoint directory: their names, the index of shards, the checksums.

It is a Hugging Face model directory. Beside the standard files stands `checksums.json` (file name
-> SHA-256), written last: a directory that has it is complete, and later damage is found on
reading. Its absence is no error: other programs do not write it. This module alone knows which
files make a model.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llama2 import atomic, json_files
from llama2.errors import UserError, explain_os_errors
from llama2.hashing import hash_file
from llama2.model import tensors
from llama2.model.llama import LlamaConfig
from llama2.terminal_text import list_some, show_value
from llama2.tokenizer import chat_settings

CONFIG, WEIGHTS = "config.json", "model.safetensors"
INDEX, CHECKSUMS = "model.safetensors.index.json", "checksums.json"
PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
# files beside the weights: how to generate, the tokenizer, the template of a chat
BESIDE = (
    chat_settings.GENERATION,
    chat_settings.MODEL,
    chat_settings.JSON,
    chat_settings.SETTINGS,
    chat_settings.SPECIAL,
    chat_settings.ADDED,
    chat_settings.TEMPLATE,
    "chat_template.json",
)
SCORE = "score.weight"
# transformers finds the last real token of a row by it; the published tokenizer has no id for
# padding
PADDING = 0
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
_FETCH = "fetch the checkpoint again"


# --- tensors and their files ---
def list_shapes(config: LlamaConfig, *, scorer: bool = False) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a model, in the order of its state dict."""
    shapes = tensors.shapes(config)
    if scorer:
        shapes.pop(tensors.HEAD, None)
        shapes[SCORE] = (1, config.hidden_size)

    return shapes


def check_shapes(
    place: object,
    expected: Mapping[str, tuple[int, ...]],
    actual: Mapping[str, tuple[int, ...]],
    described_by: str = CONFIG,
) -> None:
    """UserError unless `actual` has every expected tensor with its shape, and no other.

    The error names a few tensors of each kind of fault.
    """
    wrong = [
        f"{name} {list(actual[name])} instead of {list(shape)}"
        for name, shape in expected.items()
        if actual.get(name, shape) != shape
    ]
    faults = {
        "missing": sorted(expected.keys() - actual.keys()),
        "unknown": sorted(actual.keys() - expected.keys()),
        "wrongly shaped": wrong,
    }
    causes = [f"{len(names)} {kind}: {list_some(names)}" for kind, names in faults.items() if names]

    if causes:
        raise UserError(
            f"{place}: the tensors do not fit {described_by}: {'; '.join(causes)}",
            "the weights and the config are of different models, or the checkpoint is incomplete",
        )


def list_weight_files(directory: Path) -> list[Path]:
    """Return the weight files of a directory: one, or the shards its index names.

    Safetensors if there are both kinds. UserError if a file is missing.
    """
    for name, index in ((WEIGHTS, INDEX), (PICKLED, PICKLED_INDEX)):
        if (directory / index).exists():
            return _list_shards(directory, index)
        if (directory / name).exists():
            return [directory / name]

    raise UserError(
        f"{directory}: neither {WEIGHTS} nor {INDEX} is there, nor {PICKLED}", "check the path"
    )


def list_model_files(directory: Path) -> list[str]:
    """Return the names of all files that make up the model in a directory, for any program."""
    weights = list_weight_files(directory)
    index = INDEX if weights[0].suffix == ".safetensors" else PICKLED_INDEX
    names = {path.name for path in weights} | read_checksums(directory).keys()
    names |= {CONFIG, CHECKSUMS, index, *BESIDE}

    return sorted(name for name in names if (directory / name).is_file())


def is_model_file(name: str) -> bool:
    """Return whether a file of this name belongs to a model that this package writes."""
    return name in (CONFIG, WEIGHTS, INDEX, CHECKSUMS, *BESIDE) or bool(_SHARD.fullmatch(name))


def _list_shards(directory: Path, index: str) -> list[Path]:
    file = directory / index
    weight_map = json_files.read_object(file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{file}: no weight_map", _FETCH)

    for tensor, name in weight_map.items():
        if not json_files.is_file_name(name):
            raise UserError(f"{file}: the file of '{tensor}' is {show_value(name)}", _FETCH)
        if not (directory / name).exists():
            raise UserError(
                f"{directory / name}: missing, though {index} names it", "fetch this shard"
            )

    return [directory / name for name in sorted(set(weight_map.values()))]


# --- writing whole directories ---
def require_free(path: Path) -> None:
    """UserError if something is at a path; an empty directory is nothing."""
    with explain_os_errors(path):
        if any(path.iterdir()) if path.is_dir() else path.exists():
            raise UserError(
                f"{path}: something is there already", "choose another --out, or move it away"
            )


@contextmanager
def replace_directory(directory: Path) -> Iterator[Path]:
    """Give a place to write a checkpoint directory, which gets its name when the block ends.

    It vanishes if the block fails. In a directory that exists, the files written are replaced and
    the weights of other names removed; others stay.
    """
    if not directory.exists():
        with atomic.new_directory(directory) as work:
            yield work

        return

    work = directory / ".tmp"
    with explain_os_errors(directory):
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        try:
            yield work
            atomic.flush_tree(work)
            _replace_files(work, directory)
        finally:
            shutil.rmtree(work, ignore_errors=True)


def _replace_files(work: Path, directory: Path) -> None:
    """Move finished files over an older checkpoint.

    The checksums go first and come last: a directory caught in between has none, and one that has
    them is complete.
    """
    (directory / CHECKSUMS).unlink(missing_ok=True)
    new = sorted((path.name for path in work.iterdir()), key=lambda name: (name == CHECKSUMS, name))
    stale = {INDEX, WEIGHTS, *(path.name for path in directory.glob("model-*-of-*.safetensors"))}

    for name in new[:-1]:
        os.replace(work / name, directory / name)

    for name in stale.difference(new):
        (directory / name).unlink(missing_ok=True)

    atomic.flush(directory)
    atomic.replace(work / new[-1], directory / new[-1])


def verify_checksums(directory: Path) -> None:
    """UserError if a file differs from its entry in checksums.json; nothing if there is none."""
    for name, expected in read_checksums(directory).items():
        if not (directory / name).exists():
            raise UserError(f"{directory / name}: missing, though {CHECKSUMS} names it", _FETCH)
        if hash_file(directory / name) != expected:
            raise UserError(
                f"{directory / name}: its checksum differs from {CHECKSUMS}",
                f"fetch it again, or delete {CHECKSUMS} if you changed the file on purpose",
            )


def read_checksums(directory: Path) -> dict[str, str]:
    """Return checksums.json: file name -> checksum; {} if there is none."""
    path = directory / CHECKSUMS
    checksums = json_files.read_object(path) if path.exists() else {}
    cure = f"{_FETCH}, or delete {CHECKSUMS}"

    for name, value in checksums.items():
        if not json_files.is_file_name(name):
            raise UserError(
                f"{path}: it names {show_value(name)}, which is no file of this directory", cure
            )
        if not isinstance(value, str):
            raise UserError(
                f"{path}: the checksum of {show_value(name)} is {show_value(value)}", cure
            )

    return checksums


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON object as a file."""
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
