"""What was asked of a run and what it was made from: written when it begins, compared when its
command is repeated."""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from llama2 import atomic, schema_version
from llama2.config import StageConfig, list_incidentals, list_paths, yaml12
from llama2.errors import UserError
from llama2.ranks import Ranks
from llama2.reading import files
from llama2.runs import completion
from llama2.runs.completion import COMPLETE, CONFIG, MANIFEST, WARNINGS
from llama2.runs.fingerprints import fingerprint_as_before, fingerprint_inputs, read_code_version
from llama2.runs.locks import LOCK
from llama2.runs.sealed import seal
from llama2.schema_version import SCHEMA

SECONDS = ".seconds"  # time spent by earlier, interrupted attempts
_FIRST = (CONFIG, MANIFEST, SECONDS, WARNINGS)
_BEGUN = {LOCK, *_FIRST, *(f"{name}.tmp" for name in _FIRST)}


def check(verb: str, config: StageConfig) -> None:
    """Refuse a configuration that differs from that of the run in `config.out`, if there is one."""
    path = config.out
    if not (path / MANIFEST).is_file() or is_only_begun(path):
        return

    old = _read(path)
    if old["verb"] != verb:
        differences = [f"verb: {old['verb']} -> {verb}"]
    else:
        ignored = {*list_incidentals(config), *_around(config)}
        inputs = dict(list_paths(config))
        differences = _differences(
            _complete(old["config"], config), _describe(config), ignored, inputs
        )

    if differences:
        raise UserError(
            f"{path}: holds {_state(path)} with another configuration: {'; '.join(differences)}",
            "choose another --out, or delete that directory to start over",
        )


def is_finished(verb: str, config: StageConfig) -> bool:
    """Tell whether `config.out` holds this very run, complete; a changed configuration or input is
    refused as ever."""
    return (config.out / COMPLETE).is_file() and prepare(verb, config, Ranks.alone())


def prepare(verb: str, config: StageConfig, ranks: Ranks) -> bool:
    """Compare with what is there, record what is asked; True if there is nothing left to do."""
    check(verb, config)
    path = config.out
    inputs = fingerprint_inputs(config)
    finished = (path / COMPLETE).is_file()

    if (path / MANIFEST).is_file() and not is_only_begun(path):
        old = _read(path)
        _check_inputs(path, old["inputs"], inputs, dict(list_paths(config)))
        if finished:
            completion.check_whole(path)
        else:
            _resume(path, old, _describe(config))

        return finished

    if finished:
        raise UserError(
            f"{path / MANIFEST}: missing, though this run is finished",
            completion.suggest_cure(path),
        )
    if not is_only_begun(path):
        raise UserError(f"{path}: exists and is no run directory", "choose another --out")

    _write(path, verb, config, inputs, ranks)
    return False


def _check_inputs(
    path: Path, old: Mapping[str, str], inputs: Mapping[str, str], named: Mapping[str, Path]
) -> None:
    """UserError that names each input whose content has changed."""
    changed = [
        key
        for key, value in inputs.items()
        if old.get(key) not in (value, fingerprint_as_before(files.expand_home(named[key])))
    ]
    if changed:
        which = ", ".join(f"{key} ({named[key]})" for key in changed)
        raise UserError(
            f"{path}: holds {_state(path)} made from other inputs; changed: {which}",
            "choose another --out, or delete that directory to start over",
        )


def _write(
    path: Path, verb: str, config: StageConfig, inputs: Mapping[str, str], ranks: Ranks
) -> None:
    settings = _describe(config)
    values = {
        schema_version.KEY: SCHEMA,
        "verb": verb,
        "config": settings,
        "inputs": inputs,
        "seed": config.seed,
        "code": read_code_version(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.processor(),
        "device": ranks.device.type,
        "ranks": ranks.size,
        "threads": torch.get_num_threads(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    atomic.write_atomic(path / CONFIG, yaml12.dump(settings))
    atomic.write_atomic(path / MANIFEST, seal(values))


def _read(path: Path) -> dict[str, Any]:
    """Read what a run wrote down when it began, all that it is known by."""
    values = completion.read_manifest(path)
    if not {"verb", "config", "inputs"} <= values.keys():
        raise UserError(
            f"{path / MANIFEST}: damaged: it does not say what the run is of",
            completion.suggest_cure_unfinished(path),
        )

    return values


def _resume(path: Path, old: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Say that a run goes on, and what is not as it was."""
    print(f"{path}: resuming", file=sys.stderr)
    before, now = old.get("code"), read_code_version()
    if before != now:
        print(
            f"{path}: it was begun by other code, {before}, and goes on with {now}",
            file=sys.stderr,
        )

    file = path / CONFIG
    try:
        is_whole = yaml12.read_yaml(file) in (old["config"], settings)
    except UserError:
        is_whole = False

    if not is_whole:
        print(f"{file}: damaged; written again", file=sys.stderr)
        atomic.write_atomic(file, yaml12.dump(settings))


def is_only_begun(path: Path) -> bool:
    """Tell whether a run directory holds nothing that a stage made, but for directories without a
    file."""
    return all(file.name in _BEGUN or _is_empty(file) for file in path.iterdir())


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not any(inside.is_file() for inside in path.rglob("*"))


def _complete(old: dict[str, Any], config: StageConfig) -> dict[str, Any]:
    """Return an older configuration with the keys that it is too old to have.

    At its default, a newer key leaves everything as it was.
    """
    try:
        return _describe(type(config).model_validate({**old, "out": config.out}))
    except (ValidationError, UserError):  # it has keys or values that are gone
        return old


def _describe(config: StageConfig) -> dict[str, Any]:
    return config.model_dump(mode="json", exclude={"out"})


def _state(path: Path) -> str:
    return "a finished run" if (path / COMPLETE).is_file() else "an unfinished run"


def _around(config: StageConfig) -> set[str]:
    """Return the keys that name a directory around `out`: it may be moved, with the run in it."""
    out = config.out.resolve()
    return {
        key for key in config.around if out.is_relative_to(Path(getattr(config, key)).resolve())
    }


def _differences(
    old: Any, new: Any, ignored: Collection[str], inputs: Mapping[str, Path], key: str = ""
) -> list[str]:
    """Return what was asked and what is, where that differs.

    Inputs are compared elsewhere, by what they hold: they, and the run with them, may lie at
    another place than they did.
    """
    prefix = f"{key}." if key else ""
    if isinstance(old, dict) and isinstance(new, dict):
        names = sorted({*old, *new})
        pairs = [(f"{prefix}{name}", old.get(name), new.get(name)) for name in names]
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = [(f"{prefix}{index}", *pair) for index, pair in enumerate(zip(old, new))]
    elif old == new or key in ignored or _is_same_input(inputs.get(key), old):
        return []
    else:
        return [f"{key}: {old} -> {new}"]

    lines: list[str] = []
    for name, before, now in pairs:
        lines += _differences(before, now, ignored, inputs, name)

    return lines


def _is_same_input(path: Path | None, old: Any) -> bool:
    """Tell whether an input is called as before, wherever it lies; the name of a file tells how it
    is read."""
    if path is None or not isinstance(old, str):
        return False

    return not path.is_file() or path.name == Path(old).name
