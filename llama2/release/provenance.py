"""Provenance of a model, so that another can make it again: every stage's configuration, command,
versions and inputs.

Nothing here names a machine, a user or a directory: what a stage made is called runs/<stage>, and
what came from outside inputs/<name>, wherever either lay.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import yaml

from llama2 import runs
from llama2.config.yaml12 import read_yaml
from llama2.devices import is_cpu
from llama2.records import dump
from llama2.release import markdown as md
from llama2.release.lineage import RECIPE, Lineage, Stage
from llama2.release.measurements import Measured

LINEAGE, COMMANDS, SCRIPT, CONFIGS = "lineage.json", "COMMANDS.md", "reproduce.sh", "configs"

_ADDRESS = r"\b(?P<scheme>[A-Za-z][\w+.-]*)://[^\s/'\"]*(?P<rest>[^\s'\"]*)"
_PATH = r"(?<![^\s'\"=:,(\[])(?:~[\w.-]*|[A-Za-z]:)?[/\\][^\s'\",)\]]+"
_PLACE = re.compile(f"{_ADDRESS}|{_PATH}")
_WHOLE = re.compile(r"(?:~|[A-Za-z]:)?[/\\][^\n]*")


def write_files(lineage: Lineage, measured: Measured | None) -> dict[str, str]:
    """Write everything that says how the model was made: name -> content."""
    stages = [*lineage.stages]
    if measured is not None:
        stages.append(lineage.describe(measured.step))

    files = {f"{CONFIGS}/{stage.name}.yaml": _yaml(publish(stage)) for stage in stages}
    if lineage.name:
        files[RECIPE] = _yaml(publish_recipe(read_yaml(lineage.recipe.path / RECIPE)))

    files[LINEAGE] = dump(describe(lineage))
    files[SCRIPT] = write_script(lineage)
    files[COMMANDS] = write_commands(lineage, measured)
    return files


def _yaml(value: object) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=120)


# --- without places ---
def publish(stage: Stage) -> dict[str, Any]:
    """Return the configuration of a stage, its inputs under the names they have in a release."""
    places = {source.key: source.place for source in stage.inputs}
    # The manifest sorts its keys, and the order of versions and sources means something:
    # config.yaml keeps it.
    file, config = stage.step.path / "config.yaml", dict(stage.step.config)
    written = read_yaml(file) if file.is_file() else config
    renamed: dict[str, Any] = _rename(written if written == config else config, places)
    return renamed


def _rename(value: Any, places: Mapping[str, str], key: str = "") -> Any:
    if isinstance(value, str):
        return places.get(key) or hide_places(value)

    if isinstance(value, Mapping):
        prefix = f"{key}." if key else ""
        return {name: _rename(item, places, f"{prefix}{name}") for name, item in value.items()}

    if isinstance(value, list):
        return [_rename(item, places, f"{key}.{index}") for index, item in enumerate(value)]

    return value


def hide_places(text: str) -> str:
    """Turn absolute paths in a text into inputs/<name>, and hosts of addresses into `server`."""
    return _hide_path(text) if _WHOLE.fullmatch(text) else _PLACE.sub(_hide_match, text)


def _hide_match(match: re.Match[str]) -> str:
    if match["scheme"] in (None, "file"):
        return _hide_path(match[0])

    return f"{match['scheme']}://server{match['rest']}"


def _hide_path(path: str) -> str:
    kind = PureWindowsPath if "\\" in path else PurePosixPath
    return f"inputs/{kind(path).name or 'input'}"


def publish_recipe(recipe: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe whose directories are those of a release."""
    parameters = dict(recipe.get("parameters") or {})
    for name, value in parameters.items():
        if isinstance(value, str) and re.search(r"[/\\~]", value):
            parameters[name] = "inputs"

    published: dict[str, Any] = _rename({**recipe, "out": "runs", "parameters": parameters}, {})
    return published


# --- how to make it again ---
def describe(lineage: Lineage) -> dict[str, Any]:
    """Describe the lineage for programs: every stage with its inputs, versions, seed, time and
    fingerprints."""
    released = lineage.released
    return {
        "format": 1,
        "recipe": lineage.name,
        "model": {
            "stage": released.name,
            "fingerprint": runs.read_fingerprint(released.step.path),
            "weights": released.weights,
        },
        "stages": [_describe_stage(stage) for stage in lineage.stages],
    }


_VERSIONS = ("code", "torch", "python", "device", "ranks", "threads", "seed")


def _describe_stage(stage: Stage) -> dict[str, Any]:
    manifest, step = stage.step.manifest, stage.step
    inputs = {
        source.key: {"place": source.place, "sha256": source.digest} for source in stage.inputs
    }
    return {
        "name": stage.name,
        "verb": step.verb,
        **{name: manifest[name] for name in _VERSIONS if name in manifest},
        "date": step.started[:10],
        "seconds": step.seconds,
        "fingerprint": runs.read_fingerprint(step.path),
        "weights": stage.weights,
        "inputs": inputs,
    }


def make_command(stage: Stage) -> str:
    """Return the command that carries out a stage with as many processes and threads as it had."""
    manifest, name = stage.step.manifest, shlex.quote(stage.name)
    program = f"llama2 {stage.step.verb} {CONFIGS}/{name}.yaml --out runs/{name}"

    ranks, threads = int(manifest.get("ranks", 1)), manifest.get("threads")
    if ranks > 1:
        launcher = f"torchrun --standalone --nproc-per-node {ranks} -m llama2.cli"
        program = program.replace("llama2", launcher, 1)

    limited = threads and is_cpu(stage.step.device)
    return f"OMP_NUM_THREADS={threads} {program}" if limited else program


def write_script(lineage: Lineage) -> str:
    """Write a shell script that makes the model again."""
    lines = [
        "#!/bin/sh",
        "# Makes the model again, stage by stage. Run it in this directory; COMMANDS.md says what "
        "it needs.",
        "set -e",
        'cd "$(dirname "$0")"',
    ]
    for _, source in lineage.outside:
        place, missing = shlex.quote(source.place), shlex.quote(f"{source.place} is missing")
        lines.append(f"test -e {place} || {{ echo {missing} >&2; exit 2; }}")

    return "\n".join([*lines, *map(make_command, lineage.stages)]) + "\n"


def write_commands(lineage: Lineage, measured: Measured | None) -> str:
    """Write COMMANDS.md: what was run, with which versions, on which inputs, and what should come
    out."""
    commands = "\n".join(map(make_command, lineage.stages))

    return md.document(
        "# How the model was made",
        f"`sh {SCRIPT}` repeats the commands below, in this directory. Each reads its whole "
        f"configuration from `{CONFIGS}/` and writes `runs/<stage>`; a stage that is finished is "
        f"not repeated."
        + md.when(lineage.name, f" `{RECIPE}` is the recipe they came from, as it was last run."),
        f"```sh\n{commands}\n```",
        "## What it needs",
        _inputs(lineage) or "Nothing from outside: every input is made by an earlier stage.",
        "## Versions",
        _versions(lineage),
        "The part of a version behind the `+` is a hash of the source code.",
        "## What should come out",
        "On a CPU of the same kind, with the same versions, processes and threads, the weights "
        "have these SHA-256 sums. Elsewhere rounding differs, and with it every later sample.",
        _weights(lineage),
        _evaluation(lineage, measured),
    )


def _inputs(lineage: Lineage) -> str:
    rows = [
        (
            md.code(source.place),
            md.text(stage.name),
            md.code(source.key),
            md.code(source.digest),
        )
        for stage, source in lineage.outside
    ]
    if not rows:
        return ""

    return md.document(
        md.table(("Put here", "First read by", "As", "Fingerprint (SHA-256)"), rows, range(4)),
        "A fingerprint is that of the file; of a directory, or of the output of another run, that "
        "of the list of its files and their hashes.",
    )


def _versions(lineage: Lineage) -> str:
    headers = ("Stage", "llama2", "torch", "Python", "Device", "Processes", "Threads", "Seed")
    rows = []
    for stage in lineage.stages:
        versions = [stage.step.manifest.get(key, "–") for key in _VERSIONS]
        rows.append(tuple(map(md.text, (stage.name, *versions))))

    return md.table(headers, rows, range(5))


def _weights(lineage: Lineage) -> str:
    rows = [
        (md.text(stage.name), md.code(stage.weights)) for stage in lineage.stages if stage.weights
    ]
    return md.table(("Stage", "Weights"), rows, (0, 1))


def _evaluation(lineage: Lineage, measured: Measured | None) -> str:
    if measured is None:
        return ""

    stage = lineage.describe(measured.step)
    lineage_names = {made.name for made in lineage.stages}
    others = sorted(filter(None, stage.origins - lineage_names))
    also = f" It also needs {', '.join(map(md.code, others))}, which the model was not made from."
    return md.document(
        "## Its evaluation",
        f"The results in README.md are those of this command.{md.when(others, also)}",
        f"```sh\n{make_command(stage)}\n```",
    )


def list_places(path: Path) -> list[str]:
    """List what must not stand in any paper: the home directory and where the run lies."""
    places = {os.path.expanduser("~"), str(path.resolve().parent), str(path.absolute().parent)}
    return sorted(place for place in places if len(PurePosixPath(place).parts) > 2)
