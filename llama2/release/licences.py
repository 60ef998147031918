"""LICENSES.md: the terms of the data, the base model and the software behind a model.

A licence is what somebody wrote down: `license` beside a source in a recipe, or `--licenses.NAME`
of the release. What nobody wrote down is unknown, and is called so.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llama2.config.yaml12 import read_yaml
from llama2.errors import UserError, did_you_mean
from llama2.release import markdown as md
from llama2.release.lineage import RECIPE, Input, Lineage, Stage

FILE = "LICENSES.md"
UNKNOWN = "unknown"
_LLAMA_2 = re.compile(r"llama[-_. ]?2(?!\.?c\b)", re.IGNORECASE)
LLAMA_2_NOTE = (
    "This is a derivative of Llama 2: the Llama 2 Community License and Meta's Acceptable Use "
    "Policy apply to these weights, whatever else is said here. Read them before you use or pass "
    "on the weights; they ask that a copy of the licence goes along."
)


@dataclass(frozen=True)
class Material:
    """Something from outside that a model was made from, and its licence."""

    name: str
    stage: str
    kind: str
    place: str
    licence: str
    origin: str
    """whoever named the licence"""


def list_materials(lineage: Lineage, given: Mapping[str, str]) -> list[Material]:
    """List what came from outside: data, checkpoints and tokenizers.

    `given` is name -> licence, as this release states it. UserError for a name in it that nothing
    from outside has.
    """
    recipe = read_yaml(lineage.recipe.path / RECIPE) if lineage.name else {}
    steps = recipe.get("steps") or {}
    materials = [
        _describe(stage, source, steps.get(stage.name), given) for stage, source in lineage.outside
    ]

    names = [material.name for material in materials]
    if unknown := sorted(given.keys() - {*names, *(material.place for material in materials)}):
        raise UserError(
            f"licenses: nothing that the model was made from is called '{unknown[0]}'",
            did_you_mean(unknown[0], names) if names else "nothing came from outside: leave it out",
        )

    return materials


def _describe(stage: Stage, source: Input, step: Any, given: Mapping[str, str]) -> Material:
    name = name_source(source)
    origins = {
        "this release": given.get(name) or given.get(source.place),
        "the recipe": _licence_beside(step, source.key),
        "the run": _licence_beside(stage.step.config, source.key),
    }
    origin = next(filter(origins.get, origins), "")
    licence = origins.get(origin) or UNKNOWN
    kind = "checkpoint" if source.is_base else "data"
    kind = "tokenizer" if source.key == "tokenizer" else kind
    return Material(name, stage.name, kind, source.place, licence, origin)


def name_source(source: Input) -> str:
    """Return the NAME of `sources.NAME.path` in a configuration; otherwise the name of the file."""
    parts = source.key.split(".")
    if len(parts) > 2 and parts[-1] == "path":
        return ".".join(parts[1:-1])

    return source.place.rpartition("/")[2]


def _licence_beside(config: Any, key: str) -> str | None:
    """Return the `license` that stands beside the path at a dotted key."""
    *sections, _ = key.split(".")
    for section in sections:
        config = config.get(section) if isinstance(config, Mapping) else None

    licence = config.get("license") if isinstance(config, Mapping) and sections else None
    return str(licence) if licence else None


def is_from_llama_2(lineage: Lineage, base_model: str) -> bool:
    """Return whether the model began with Llama 2's weights, as far as names tell."""
    names = [base_model, *(source.place for source in lineage.checkpoints)]
    return any(map(_LLAMA_2.search, names))


def document(lineage: Lineage, materials: Sequence[Material], licence: str, base_model: str) -> str:
    """Write LICENSES.md."""
    bases = [material for material in materials if material.kind != "data"]
    data = [material for material in materials if material.kind == "data"]
    unknown = sum(material.licence == UNKNOWN for material in materials)

    return md.document(
        "# Licences",
        md.when(
            unknown,
            f"**{unknown} of {len(materials)} licences are unknown.** Find them out before you use "
            "the weights for anything that a licence might forbid.",
        ),
        "## These weights",
        _weights(licence),
        md.when(is_from_llama_2(lineage, base_model), LLAMA_2_NOTE),
        "## Base models and tokenizers",
        _table(bases)
        or "None: the weights began at random, and the tokenizer was trained on the data below.",
        _base(bases, lineage, base_model),
        "## Data",
        _generated(lineage),
        _table(data),
        "" if data or lineage.of("world") else "Nothing is known about the data.",
        "## Software",
        "The model was made with `llama2`, which is under the Apache License 2.0. The code's "
        "licence is not the weights'.",
    )


def _weights(licence: str) -> str:
    if licence:
        return f"Licence: {md.text(licence)}, as whoever released them says."

    return (
        "Nobody has named a licence for these weights. Without one, as a rule nobody but their "
        "maker may pass them on."
    )


def _base(bases: Sequence[Material], lineage: Lineage, base_model: str) -> str:
    if not any(material.kind == "checkpoint" for material in bases):
        return ""

    if base_model:
        return (
            f"The base model is {md.code(base_model)}, as whoever released this says. Its licence "
            "applies."
        )
    if is_from_llama_2(lineage, base_model):
        return ""

    return (
        "Whoever made a checkpoint named here may have set terms for what is derived from it. "
        "Should it be, or stem from, a Llama 2 model, the Llama 2 Community License applies."
    )


def _generated(lineage: Lineage) -> str:
    names = ", ".join(md.code(stage.name) for stage in lineage.of("world"))
    if not names:
        return ""

    return (
        f"What the stage {names} left is synthetic: `llama2 world` writes it by rule from made-up "
        "words and common ones. It holds no third-party text and no personal data, and comes, like "
        "the program, under the Apache License 2.0."
    )


def _table(materials: Sequence[Material]) -> str:
    rows = [
        (
            md.text(material.name),
            md.text(material.stage),
            material.kind,
            md.code(material.place),
            _emphasise(material.licence),
            material.origin,
        )
        for material in materials
    ]
    return md.table(("Name", "Stage", "What", "Called here", "Licence", "Said by"), rows, range(6))


def _emphasise(licence: str) -> str:
    return "**unknown**" if licence == UNKNOWN else md.text(licence)
