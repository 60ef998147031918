"""What a checkpoint directory consists of: the names of its files, the index of shards, the
checksums.

It is a Hugging Face model directory. Beside the standard files stands `checksums.json` (file name
-> SHA-256), written last: a directory that has it is complete, and what was damaged later is found
on reading. Its absence is no error: other programs do not write it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llama2 import atomic, json_files
from llama2.errors import UserError, explain_os_errors
from llama2.model import tensors
from llama2.model.llama import LlamaConfig
from llama2.terminal_text import list_some, shown

CONFIG, WEIGHTS, INDEX, CHECKSUMS = (
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "checksums.json",
)
PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
BESIDE = (
    "generation_config.json",
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
"""what may stand beside the weights: how to generate, the tokenizer, the template of a chat"""
SCORE = "score.weight"
# transformers finds the last real token of a row by it; the published tokenizer has no id for
# padding
PADDING = 0
read_json = json_files.json_object


# ---- tensors and their files
# ----------------------------------------------------------------------------------------
def shapes(config: LlamaConfig, *, scorer: bool = False) -> dict[str, tuple[int, ...]]:
    """Every tensor of a model of this shape, in the order of its state dict."""
    found = tensors.shapes(config)
    if scorer:
        found.pop(tensors.HEAD, None)
        found[SCORE] = (1, config.hidden_size)

    return found


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


def weight_files(directory: Path) -> list[Path]:
    """The weight files of a directory: one, or the shards its index names; safetensors if there are
    both kinds."""
    for whole, index in ((WEIGHTS, INDEX), (PICKLED, PICKLED_INDEX)):
        if (directory / index).exists():
            return _shards(directory, index)
        if (directory / whole).exists():
            return [directory / whole]

    raise UserError(
        f"{directory}: neither {WEIGHTS} nor {INDEX} is there, nor {PICKLED}", "check the path"
    )


def model_files(directory: Path) -> list[str]:
    """The names of all files that make up the model in a directory: what any program reads
    there."""
    weights = weight_files(directory)
    index = INDEX if weights[0].suffix == ".safetensors" else PICKLED_INDEX
    names = {path.name for path in weights} | {CONFIG, CHECKSUMS, index, *BESIDE}

    return sorted(name for name in names | set(listed(directory)) if (directory / name).is_file())


def _shards(directory: Path, index: str) -> list[Path]:
    weight_map = read_json(directory / index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{directory / index}: no weight_map", "fetch the checkpoint again")

    for tensor, name in weight_map.items():
        if not json_files.is_own(name):
            raise UserError(
                f"{directory / index}: the file of '{tensor}' is {shown(name)}",
                "fetch the checkpoint again",
            )
        if not (directory / name).exists():
            raise UserError(
                f"{directory / name}: missing, though {index} names it", "fetch this shard"
            )

    return [directory / name for name in sorted(set(weight_map.values()))]


# ---- writing whole directories
# --------------------------------------------------------------------------------------
@contextmanager
def replacing(directory: Path) -> Iterator[Path]:
    """A place to write a checkpoint directory, which takes its name when the block ends and
    vanishes if it fails.

    Of a directory that exists, the files written are replaced and the weights of other names
    removed; others stay.
    """
    with explain_os_errors(directory):
        fresh = not directory.exists()
        work = directory.with_name(f".{directory.name}.tmp") if fresh else directory / ".tmp"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)

        try:
            yield work
            atomic.flush_tree(work)
            if fresh:
                atomic.replace(work, directory)
            else:
                _replace_files(work, directory)
        finally:
            shutil.rmtree(work, ignore_errors=True)


def _replace_files(work: Path, directory: Path) -> None:
    """Move finished files over an older checkpoint. The checksums go first and come last: a
    directory caught in between has none, and one that has them is whole."""
    (directory / CHECKSUMS).unlink(missing_ok=True)
    new = sorted((path.name for path in work.iterdir()), key=lambda name: (name == CHECKSUMS, name))
    stale = {
        INDEX,
        WEIGHTS,
        *(path.name for path in directory.glob("model-*-of-*.safetensors")),
    } - set(new)

    for name in new[:-1]:
        os.replace(work / name, directory / name)

    for name in stale:
        (directory / name).unlink(missing_ok=True)

    atomic.flush(directory)
    atomic.replace(work / new[-1], directory / new[-1])


def verify_checksums(directory: Path) -> None:
    """UserError if a file differs from what checksums.json says; nothing if there is none."""
    for name, expected in listed(directory).items():
        if not (directory / name).exists():
            raise UserError(
                f"{directory / name}: missing, though {CHECKSUMS} names it",
                "fetch the checkpoint again",
            )
        if json_files.sha256(directory / name) != expected:
            raise UserError(
                f"{directory / name}: its checksum differs from {CHECKSUMS}",
                f"fetch it again, or delete {CHECKSUMS} if you changed the file on purpose",
            )


def listed(directory: Path) -> dict[str, str]:
    """What checksums.json says: the names of files of the directory, each with its checksum; {} if
    there is none."""
    path = directory / CHECKSUMS
    found = read_json(path) if path.exists() else {}
    cure = f"fetch the checkpoint again, or delete {CHECKSUMS}"

    for name, value in found.items():
        if not json_files.is_own(name):
            raise UserError(
                f"{path}: it names {shown(name)}, which is no file of this directory", cure
            )
        if not isinstance(value, str):
            raise UserError(f"{path}: the checksum of {shown(name)} is {shown(value)}", cure)

    return found


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """A JSON object as a file."""
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
