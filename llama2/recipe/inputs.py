"""Inputs of a command that are missing, damaged or not meant: named before any work."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel

from llama2 import json_files, model_packages
from llama2.config import StageConfig, list_paths
from llama2.errors import UserError
from llama2.runs import COMPLETE, completion, read_list
from llama2.terminal_text import say

_MODELS = {
    "model",
    "policy",
    "policies",
    "critic",
    "rewards",
    "judge",
    "candidate",
    "predecessor",
    "versions",
    "checkpoint",
    "checkpoints",
    "run",
}
"""keys that name models"""
_OWN = (
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.json",
    "chat_template.jinja",
    "checksums.json",
)
"""what people change in a model's folder, such as its template, and other programs when they save
it"""
_FEW = 8
"""missing inputs that are named with the keys that ask for them"""
_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_FILES = (
    *(".jsonl", ".json", ".csv", ".tsv", ".txt", ".gz", ".zst", ".parquet"),
    *(".model", ".gguf", ".bin", ".zip"),
)
"""endings of what is no name of a repository on the Hugging Face Hub"""


def check(config: BaseModel, *, complete: bool, later: Sequence[Path] = ()) -> None:
    """Raise UserError for inputs that cannot be meant.

    complete: every path that is named must be there. later: what lies below these is made later.
    """
    for key, path in list_paths(config):
        if _is_model(key) and not any(path.is_relative_to(parent) for parent in later):
            _check_model(path, scorer=not {"rewards", "judge"}.isdisjoint(key.split(".")))
        if isinstance(config, StageConfig):
            _refuse_inside(config.out, key, path)

    if complete:
        refuse_missing(list_paths(config))


def check_whole(config: BaseModel) -> None:
    """UserError for an input that is not what the finished run in which it lies wrote.

    What a model's folder holds for other programs may be a user's own; that is said, as it may be
    damage as well. Not so in a release, which vouches for all it holds.
    """
    for key, path in list_paths(config):
        run = completion.find_run(path)
        if run is not None:
            changeable = _OWN if run == path and _is_model(key) and key != "run" else ()
            completion.check(run, path.relative_to(run).as_posix(), but=changeable)
            for fault in completion.find_faults(run, changeable):
                say(f"{fault.cause}; the model is used as it is")


def _refuse_inside(out: Path, key: str, path: Path) -> None:
    """UserError for a run that would change an input by lying in it; what a finished run holds is
    known for good."""
    if not path.is_dir() or (path / COMPLETE).is_file():
        return
    if out.resolve().is_relative_to(path.resolve()):
        raise UserError(
            f"{out}: lies in {path}, which is an input ({key}) and would change",
            "choose another --out",
        )


def _check_model(path: Path, *, scorer: bool) -> None:
    """UserError for a path that holds no model but looks like something that has one. scorer: a
    reward model is asked for."""
    model_packages.locate(path)  # which says how to install it
    if not path.exists() and _is_of_the_hub(path):
        raise _explain_missing(path)

    if (path / "steps.json").is_file() and not (path / "config.json").exists():
        models = _list_models(path, scorer)
        cure = "it has no such model yet"
        if models:
            cure = (
                f"give one of its models, such as {path / models[-1]}; it has {', '.join(models)}"
            )

        raise UserError(f"{path}: this is the directory of a recipe, not of a model", cure)


def _list_models(recipe: Path, scorer: bool) -> list[str]:
    """Return the steps of a recipe that left a model of the kind asked for."""
    models: list[str] = []
    for name in read_list(recipe / "steps.json", "repeat `llama2 run`, which writes it"):
        file = recipe / name / "config.json"
        if file.is_file() and scorer == (b"SequenceClassification" in json_files.read_bytes(file)):
            models.append(name)

    return models


def refuse_missing(needed: Sequence[tuple[str, Path]]) -> None:
    """UserError that names every path which is not there, with the key that asks for it."""
    absent: dict[Path, str] = {}
    for key, path in needed:
        if not path.exists() and not re.search(
            r"[*?\[]", str(path)
        ):  # its reader looks up a pattern
            absent.setdefault(path, key)

    if len(absent) == 1:
        raise _explain_missing(*absent)
    if absent:
        raise UserError(
            f"{len(absent)} inputs are missing{_list_absent(absent)}",
            "check the paths, or run the stages that make them",
        )


def _list_absent(absent: Mapping[Path, str]) -> str:
    """Return every path with its key, or many of one directory by what lies below it, so that one
    line holds them all."""
    common = os.path.commonpath([path.absolute() for path in absent])
    if len(absent) <= _FEW or common == os.sep:
        return ": " + ", ".join(f"{path} ({key})" for path, key in absent.items())

    names = [str(path.absolute().relative_to(common)) for path in absent]
    return f" below {common}: {', '.join(names)}"


def _explain_missing(path: Path) -> UserError:
    cure = "check the path, or run the stage that makes it"
    if _is_of_the_hub(path):
        cure = (
            "nothing is downloaded here: to have it from the Hugging Face Hub, run "
            f"`hf download {path} --local-dir {path.name}` and give {path.name}"
        )

    return UserError(f"{path}: no such file or directory", cure)


def _is_of_the_hub(path: Path) -> bool:
    """Return whether a missing path reads like OWNER/NAME."""
    if path.parent.exists() or path.suffix in _FILES:
        return False

    return _HUB.fullmatch(str(path)) is not None


def _is_model(key: str) -> bool:
    # `path` alone is what is imported
    return key == "path" or not _MODELS.isdisjoint(key.split("."))
