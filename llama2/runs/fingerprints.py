"""What an input contains, and which code reads it: two runs with the same answers did the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import llama2
from llama2 import environment
from llama2.config import StageConfig, list_paths
from llama2.errors import UserError
from llama2.hashing import hash_content, hash_file
from llama2.reading import files
from llama2.runs import completion
from llama2.runs.completion import MANIFEST

# names of keys, in every stage
_MODELS = {"model", "policy", "critic", "candidate", "predecessor", "helpful", "safe"}
_MODELS_BY_NAME = {"versions", "policies"}


def fingerprint(path: Path) -> str:
    """Return a hash of what `path` contains: of a finished run its outputs, of a file or other
    directory its content; of a glob all that of what it matches. UserError names an output that is
    not what its run wrote."""
    matches = files.find_matches(path)
    if not files.is_pattern(path):
        return _fingerprint(matches[0])

    root = files.find_fixed_folder(path)
    return _digest({match.relative_to(root).as_posix(): _fingerprint(match) for match in matches})


def fingerprint_as_before(path: Path) -> str | None:
    """Return what earlier versions took for the fingerprint of a glob: it held where the files
    lie."""
    if not files.is_pattern(path):
        return None

    return _digest({str(match): _fingerprint(match) for match in files.find_matches(path)})


def read_fingerprint(run: Path, inside: str = ".") -> str:
    """Return the fingerprint of what a finished run wrote, or of a path inside, whatever has become
    of it."""
    return _digest(completion.read_hashes(run, inside))


def _fingerprint(path: Path) -> str:
    run = completion.find_run(path)
    if run is not None:
        inside = path.relative_to(run).as_posix()
        outputs = completion.check(run, inside)
        if outputs or inside == ".":  # anything else was put there by somebody
            return _digest(outputs)

    if path.is_file():
        return hash_file(path)
    if not path.is_dir():
        raise UserError(
            f"{path}: a pipe or a device, of which nobody can tell later what was read",
            "write it to a file first",
        )
    if (path / MANIFEST).is_file():
        raise UserError(f"{path}: this run is not finished", "finish it first: repeat its command")

    return _digest(completion.hash_contents(path))


def _digest(value: Mapping[str, str]) -> str:
    return hash_content(json.dumps(value, sort_keys=True))


def fingerprint_inputs(config: StageConfig) -> dict[str, str]:
    """Return the fingerprint of every input. A folder where a model should be is looked into before
    it is read through."""
    inputs = dict(list_paths(config))
    for key, path in inputs.items():
        if _is_model(key):
            _check_model(key, path)

    return {key: fingerprint(path) for key, path in inputs.items()}


def _is_model(key: str) -> bool:
    *_, above, last = ("", *key.split("."))
    return last in _MODELS or (above in _MODELS_BY_NAME and last != "path")


def _check_model(key: str, path: Path) -> None:
    """UserError for a folder without a model in it."""
    folder = files.expand_home(path)
    if not folder.is_dir() or any((folder / n).is_file() for n in (MANIFEST, "config.json")):
        return

    cure = f"give a checkpoint directory as {key}"
    if (folder / "adapter_config.json").is_file():
        cure = (
            f"it is a PEFT adapter: `llama2 import {path} --base BASE --out MODEL` joins it to its "
            "base"
        )
    elif ggufs := sorted(folder.glob("*.gguf")):
        cure = f"give the file itself: {ggufs[0]}"

    raise UserError(f"{path}: config.json: missing, so this folder holds no model", cure)


def is_output(path: Path) -> bool:
    """Tell whether a finished run wrote `path`: such a file may be empty, because nothing passed
    the stage's gate."""
    return completion.find_run(path.parent) is not None


@cache
def read_code_version() -> str:
    """Return the package's version, a hash of its source, and what was switched off: two runs with
    the same value ran the same code."""
    root = Path(llama2.__file__).parent
    sources = sorted(path for path in root.rglob("*") if path.suffix in (".py", ".cpp", ".h"))
    digest = hashlib.sha256()
    for file in sources:
        digest.update(file.relative_to(root).as_posix().encode() + file.read_bytes())

    switches = "" if environment.wants_native() else ".nonative"
    return f"{llama2.__version__}+{digest.hexdigest()[:12]}{switches}"
