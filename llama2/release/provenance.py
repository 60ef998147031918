"""How a model was made, so that another can make it again: every stage's configuration, command,
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


def files(lineage: Lineage, measured: Measured | None) -> dict[str, str]:
    """Name -> content of everything that says how the model was made."""
    found = {f"{CONFIGS}/{stage.name}.yaml": _yaml(published(stage)) for stage in lineage.stages}
    if measured is not None:
        found[f"{CONFIGS}/{measured.step.name}.yaml"] = _yaml(
            published(lineage.describe(measured.step))
        )

    if lineage.name:
        found[RECIPE] = _yaml(published_recipe(read_yaml(lineage.recipe.path / RECIPE)))

    found[LINEAGE] = dump(described(lineage))
    found[SCRIPT] = script(lineage)
    found[COMMANDS] = commands(lineage, measured)

    return found


def _yaml(value: object) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=120)


# ---- without places
# -------------------------------------------------------------------------------------------------
def published(stage: Stage) -> dict[str, Any]:
    """The configuration of a stage, its inputs under the names they have in a release."""
    places = {one.key: one.place for one in stage.inputs}
    # The manifest sorts its keys, and the order of versions and sources means something:
    # config.yaml keeps it.
    file, config = stage.step.path / "config.yaml", dict(stage.step.config)
    written = read_yaml(file) if file.is_file() else config
    found: dict[str, Any] = _renamed(written if written == config else config, places)

    return found


def _renamed(value: Any, places: Mapping[str, str], key: str = "") -> Any:
    if isinstance(value, str):
        return places.get(key) or without_places(value)
    if isinstance(value, Mapping):
        return {
            name: _renamed(item, places, f"{key}.{name}" if key else str(name))
            for name, item in value.items()
        }
    if isinstance(value, list):
        return [_renamed(item, places, f"{key}.{index}") for index, item in enumerate(value)]

    return value


def without_places(text: str) -> str:
    """Text in which absolute paths have become inputs/<name>, and the hosts of addresses
    `server`."""
    if _WHOLE.fullmatch(text):
        return f"inputs/{_last(text)}"

    return _PLACE.sub(_hidden, text)


def _hidden(match: re.Match[str]) -> str:
    if match["scheme"] in (None, "file"):
        return f"inputs/{_last(match[0])}"

    return f"{match['scheme']}://server{match['rest']}"


def _last(path: str) -> str:
    kind = PureWindowsPath if "\\" in path else PurePosixPath
    return kind(path).name or "input"


def published_recipe(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe whose directories are those of a release."""
    parameters = {
        name: "inputs" if isinstance(value, str) and re.search(r"[/\\~]", value) else value
        for name, value in (recipe.get("parameters") or {}).items()
    }
    found: dict[str, Any] = _renamed({**recipe, "out": "runs", "parameters": parameters}, {})
    return found


# ---- how to make it again
# ----------------------------------------------------------------------------------------
def described(lineage: Lineage) -> dict[str, Any]:
    """The lineage for programs: every stage with its inputs, versions, seed, time and
    fingerprints."""
    released = lineage.released
    return {
        "format": 1,
        "recipe": lineage.name,
        "model": {
            "stage": released.name,
            "fingerprint": runs.recorded(released.step.path),
            "weights": released.weights,
        },
        "stages": [_stage(stage) for stage in lineage.stages],
    }


def _stage(stage: Stage) -> dict[str, Any]:
    manifest, step = stage.step.manifest, stage.step
    kept = {
        name: manifest[name]
        for name in ("code", "torch", "python", "device", "ranks", "threads", "seed")
        if name in manifest
    }
    return {
        "name": stage.name,
        "verb": step.verb,
        **kept,
        "date": date(stage),
        "seconds": step.seconds,
        "fingerprint": runs.recorded(step.path),
        "weights": stage.weights,
        "inputs": {one.key: {"place": one.place, "sha256": one.digest} for one in stage.inputs},
    }


def date(stage: Stage) -> str:
    """The day on which a stage began."""
    return str(stage.step.manifest.get("started", ""))[:10]


def command(stage: Stage, out: str = "") -> str:
    """The command that carries out a stage with as many processes and threads as it had."""
    manifest = stage.step.manifest
    ranks, threads = int(manifest.get("ranks", 1)), manifest.get("threads")
    program = (
        f"torchrun --standalone --nproc-per-node {ranks} -m llama2.cli" if ranks > 1 else "llama2"
    )
    limit = f"OMP_NUM_THREADS={threads} " if threads and is_cpu(stage.step.device) else ""
    name = shlex.quote(stage.name)

    return f"{limit}{program} {stage.step.verb} {CONFIGS}/{name}.yaml --out {out or f'runs/{name}'}"


def script(lineage: Lineage) -> str:
    """A shell script that makes the model again."""
    lines = [
        "#!/bin/sh",
        "# Makes the model again, stage by stage. Run it in this directory; COMMANDS.md says what "
        "it needs.",
        "set -e",
        'cd "$(dirname "$0")"',
    ]
    lines += [
        f"test -e {shlex.quote(one.place)} || {{ echo {shlex.quote(f'{one.place} is missing')} >&2; exit 2; }}"
        for _, one in lineage.outside
    ]
    return "\n".join([*lines, *(command(stage) for stage in lineage.stages)]) + "\n"


def commands(lineage: Lineage, measured: Measured | None) -> str:
    """COMMANDS.md: what was run, with which versions, on which inputs, and what should come out."""
    outside = [
        (md.code(one.place), md.text(stage.name), md.code(one.key), md.code(one.digest))
        for stage, one in lineage.outside
    ]
    versions = [
        (
            md.text(stage.name),
            *(
                md.text(stage.step.manifest.get(key, "–"))
                for key in ("code", "torch", "python", "device", "ranks", "threads", "seed")
            ),
        )
        for stage in lineage.stages
    ]
    results = [
        (md.text(stage.name), md.code(stage.weights)) for stage in lineage.stages if stage.weights
    ]

    return md.document(
        "# How the model was made",
        f"`sh {SCRIPT}` repeats the commands below, in this directory. Each reads its whole configuration from "
        f"`{CONFIGS}/` and writes `runs/<stage>`; a stage that is finished is not repeated."
        + (
            f" `{RECIPE}` is the recipe they came from, as it was last run." if lineage.name else ""
        ),
        "```sh\n" + "\n".join(command(stage) for stage in lineage.stages) + "\n```",
        "## What it needs",
        md.table(("Put here", "First read by", "As", "Fingerprint (SHA-256)"), outside, range(4))
        if outside
        else "Nothing from outside: every input is made by an earlier stage.",
        "A fingerprint is that of the file; of a directory, or of the output of another run, that of the list of its "
        "files and their hashes."
        if outside
        else "",
        "## Versions",
        md.table(
            ("Stage", "llama2", "torch", "Python", "Device", "Processes", "Threads", "Seed"),
            versions,
            (0, 1, 2, 3, 4),
        ),
        "The part of a version behind the `+` is a hash of the source code.",
        "## What should come out",
        "On a CPU of the same kind, with the same versions, processes and threads, the weights have these SHA-256 "
        "sums. Elsewhere rounding differs, and with it every later sample.",
        md.table(("Stage", "Weights"), results, (0, 1)),
        _evaluation(lineage, measured),
    )


def _evaluation(lineage: Lineage, measured: Measured | None) -> str:
    if measured is None:
        return ""

    stage = lineage.describe(measured.step)
    needed = sorted(
        {one.stage for one in stage.inputs if one.stage} - {one.name for one in lineage.stages}
    )
    also = (
        f" It also needs {', '.join(map(md.code, needed))}, which the model was not made from."
        if needed
        else ""
    )

    return md.document(
        "## Its evaluation",
        f"The results in README.md are those of this command.{also}",
        f"```sh\n{command(stage)}\n```",
    )


def places(path: Path) -> list[str]:
    """What must not stand in any paper: the home directory and where the run lies."""
    found = {os.path.expanduser("~"), str(path.resolve().parent), str(path.absolute().parent)}
    return sorted(place for place in found if len(PurePosixPath(place).parts) > 2)
