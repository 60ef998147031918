"""LICENSES.md: under which terms the data, the base model and the software behind a model come.

A licence is what somebody wrote down: `license` beside a source in a recipe, or `--licenses.NAME`
of the release. What nobody wrote down is unknown, and is called so.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
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
    "This is a derivative of Llama 2: the Llama 2 Community License and Meta's Acceptable Use Policy apply "
    "to these weights, whatever else is said here. Read them before you use or pass on the weights; they "
    "ask that a copy of the licence goes along."
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
    """who said so"""

    @property
    def known(self) -> bool:
        return self.licence != UNKNOWN


def materials(lineage: Lineage, given: Mapping[str, str]) -> list[Material]:
    """What came from outside: data, checkpoints and tokenizers. `given` is name -> licence, said
    for this release.

    UserError for a name in `given` that nothing from outside has.
    """
    recipe = read_yaml(lineage.recipe.path / RECIPE) if lineage.name else {}
    bases = {one.place for _, one in lineage.bases}
    found = [
        _material(stage, one, one.place in bases, recipe, given) for stage, one in lineage.outside
    ]

    if strange := sorted(set(given) - {name for one in found for name in (one.name, one.place)}):
        names = [one.name for one in found]
        raise UserError(
            f"licenses: nothing that the model was made from is called '{strange[0]}'",
            did_you_mean(strange[0], names) if names else "nothing came from outside: leave it out",
        )

    return found


def _material(
    stage: Stage, one: Input, base: bool, recipe: Mapping[str, Any], given: Mapping[str, str]
) -> Material:
    name = source_name(one)
    said = given.get(name) or given.get(one.place)
    now = _beside((recipe.get("steps") or {}).get(stage.name), one.key)
    then = _beside(stage.step.config, one.key)
    licence = said or now or then or UNKNOWN
    origin = "this release" if said else "the recipe" if now else "the run" if then else ""
    kind = "tokenizer" if one.key == "tokenizer" else "checkpoint" if base else "data"

    return Material(name, stage.name, kind, one.place, licence, origin)


def source_name(one: Input) -> str:
    """What a configuration calls an input: the NAME of `sources.NAME.path`; otherwise the name of
    the file."""
    parts = one.key.split(".")
    return (
        ".".join(parts[1:-1])
        if len(parts) > 2 and parts[-1] == "path"
        else one.place.rpartition("/")[2]
    )


def _beside(config: Any, key: str) -> str | None:
    """The `license` that stands beside the path at a dotted key."""
    *sections, _ = key.split(".")
    for section in sections:
        config = config.get(section) if isinstance(config, Mapping) else None

    said = config.get("license") if isinstance(config, Mapping) and sections else None
    return str(said) if said else None


def from_llama_2(lineage: Lineage, base_model: str) -> bool:
    """Whether the model began with Llama 2's weights, as far as names tell."""
    names = [base_model, *(one.place for _, one in lineage.bases if one.key != "tokenizer")]
    return any(_LLAMA_2.search(name) for name in names)


def document(lineage: Lineage, found: list[Material], licence: str, base_model: str) -> str:
    """LICENSES.md."""
    bases = [one for one in found if one.kind != "data"]
    data = [one for one in found if one.kind == "data"]
    unknown = [one for one in found if not one.known]
    warning = (
        f"**{len(unknown)} of {len(found)} licences are unknown.** Find them out before you use the weights "
        "for anything that a licence might forbid."
        if unknown
        else ""
    )

    return md.document(
        "# Licences",
        warning,
        "## These weights",
        _weights(licence),
        LLAMA_2_NOTE if from_llama_2(lineage, base_model) else "",
        "## Base models and tokenizers",
        _table(bases)
        if bases
        else "None: the weights began at random, and the tokenizer was trained on the data below.",
        _base(bases, lineage, base_model),
        "## Data",
        _generated(lineage),
        _table(data),
        "" if data or lineage.of("world") else "Nothing is known about the data.",
        "## Software",
        "The model was made with `llama2`, which is under the Apache License 2.0. The code's licence is "
        "not the weights'.",
    )


def _weights(licence: str) -> str:
    return (
        f"Licence: {md.text(licence)}, as whoever released them says."
        if licence
        else "Nobody has named a licence for these weights. Without one, as a rule nobody but their maker may pass them on."
    )


def _base(bases: list[Material], lineage: Lineage, base_model: str) -> str:
    if not any(one.kind == "checkpoint" for one in bases):
        return ""
    if base_model:
        return f"The base model is {md.code(base_model)}, as whoever released this says. Its licence applies."
    if from_llama_2(lineage, base_model):
        return ""

    return (
        "Whoever made a checkpoint named here may have set terms for what is derived from it. Should it be, or "
        "stem from, a Llama 2 model, the Llama 2 Community License applies."
    )


def _generated(lineage: Lineage) -> str:
    if not lineage.of("world"):
        return ""

    names = ", ".join(md.code(stage.name) for stage in lineage.of("world"))
    return (
        f"What the stage {names} left is synthetic: `llama2 world` writes it by rule from made-up words and "
        "common ones. It holds no third-party text and no personal data, and comes, like the program, under the "
        "Apache License 2.0."
    )


def _table(found: list[Material]) -> str:
    rows = [
        (
            md.text(one.name),
            md.text(one.stage),
            one.kind,
            md.code(one.place),
            md.text(one.licence) if one.known else "**unknown**",
            one.origin,
        )
        for one in found
    ]
    return (
        md.table(("Name", "Stage", "What", "Called here", "Licence", "Said by"), rows, range(6))
        if rows
        else ""
    )
