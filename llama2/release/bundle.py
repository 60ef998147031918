"""`llama2 release RUN --out DIR`: a model with the papers a responsible release needs (§5.3,
appendix A.7).

The same run and the same settings give the same bytes, wherever and whenever: no file names a time,
a machine, a user or a directory of it. SHA256SUMS is written last, and the whole appears at once or
not at all.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator

from llama2 import atomic, json_files, runs
from llama2.config import Config as Section
from llama2.convert.export import Kind
from llama2.errors import UserError
from llama2.formats import hf_directory
from llama2.formats.gguf_metadata import Precision
from llama2.hashing import hash_file
from llama2.release import (
    carbon_statement,
    hub,
    licences,
    provenance,
    responsible_use,
    weight_files,
)
from llama2.release import card as cards
from llama2.release.lineage import Lineage, trace
from llama2.release.measurements import find_measured
from llama2.report.energy import Power
from llama2.terminal_text import say

POSITIONAL = "run"
SUMS = "SHA256SUMS"
_DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


def _split_names(value: Any) -> Any:
    """Return `f16,q8_0` as a list, also as one word of a list; anything else as it is."""
    words = [value] if isinstance(value, str) else value
    if not isinstance(words, (list, tuple)) or not all(isinstance(word, str) for word in words):
        return value

    return tuple(filter(None, ",".join(words).split(",")))


class Config(Section):
    """Release a model: its weights, a model card, its carbon, licences, limits, and how it was
    made."""

    run: Path
    """directory of a finished run that holds a model"""
    out: Path
    """directory of the release; one that holds an earlier release of the same run is replaced"""
    dtype: Kind | None = None
    """type of the weights; without it, the run's own files"""
    gguf: Annotated[tuple[Precision, ...], BeforeValidator(_split_names)] = ()
    """GGUF copies to add, separated by commas"""
    card: cards.Card = cards.Card()
    """what only a person can say"""
    licenses: dict[str, str] = {}
    """name of a source, or file -> its licence, where the recipe does not say"""
    power: Power = Power()
    """what energy and carbon are reckoned with"""
    push: str | None = None
    """OWNER/NAME: upload to this repository of the Hugging Face Hub"""
    private: bool = True
    """whether a repository that the upload creates is private"""
    yes: bool = False
    """upload without asking"""


def run(config: Config) -> None:
    """Write the release, and upload it if that is asked for."""
    lineage = trace(config.run)
    _check_target(config.out, config.run, lineage)
    client = hub.connect(config.push, sure=config.yes) if config.push is not None else None
    weight_files.check(lineage.released)

    with atomic.new_directory(config.out.resolve()) as work:
        fill(config, lineage, work)

    count = len((config.out / SUMS).read_text(encoding="utf-8").splitlines())
    say(f"{config.out}: {count} files and their checksums")
    if client is not None and config.push is not None:
        hub.push(config.out, config.push, client, private=config.private, sure=config.yes)

    print(config.out)


def fill(config: Config, lineage: Lineage, work: Path) -> None:
    """Write everything into an empty directory, the checksums last."""
    measured = find_measured(lineage)
    materials = licences.list_materials(lineage, config.licenses)
    weight_files.write(lineage.released, work, config.dtype)
    settings = json_files.read_object(work / hf_directory.CONFIG)
    dtype = str(settings.get("dtype", settings.get("torch_dtype")))
    model = cards.ReleasedModel(
        lineage,
        measured,
        materials,
        config.card,
        config.power,
        _DTYPES.get(dtype, "not stated"),
        config.dtype is not None,
    )
    copies = weight_files.write_gguf(lineage.released, work, config.gguf, model.title)
    for name, text in write_papers(replace(model, gguf=copies)).items():
        atomic.write_atomic(work / name, text)

    (work / provenance.SCRIPT).chmod(0o755)
    _check_private(work, config.run)
    (work / SUMS).write_text(list_sums(work), encoding="utf-8")


def write_papers(model: cards.ReleasedModel) -> dict[str, str]:
    """Write all papers of a model: name -> content."""
    lineage, measured = model.lineage, model.measured
    return {
        cards.FILE: cards.document(model),
        responsible_use.FILE: responsible_use.document(model),
        carbon_statement.FILE: carbon_statement.document(lineage, measured, model.power),
        carbon_statement.NUMBERS: carbon_statement.write_numbers(lineage, model.power),
        licences.FILE: licences.document(
            lineage, model.materials, model.card.license, model.card.base_model
        ),
        **provenance.write_files(lineage, measured),
    }


def list_sums(release: Path) -> str:
    """Write one line for every file but SHA256SUMS, sorted, as sha256sum reads them."""
    names = [name for name in _list_files(release) if name != SUMS]
    return "".join(f"{hash_file(release / name)}  {name}\n" for name in names)


def _list_files(directory: Path) -> list[str]:
    files = [path for path in directory.rglob("*") if path.is_file()]
    return sorted(path.relative_to(directory).as_posix() for path in files)


def _check_private(work: Path, run: Path) -> None:
    """UserError if a paper names the home directory or where the run lies; what a person wrote is
    no exception."""
    for name in _list_files(work):
        if not name.endswith((".md", ".json", ".yaml", ".sh")):
            continue

        text = (work / name).read_text(encoding="utf-8")
        for place in provenance.list_places(run):
            if place in text:
                raise UserError(
                    f"{name} would name the directory {place}",
                    "take it out of --card.notes and the other --card settings, and out of the "
                    "names in the recipe",
                )


# --- where it goes ---
def _check_target(out: Path, run: Path, lineage: Lineage) -> None:
    """UserError unless `out` is absent, empty, or an earlier release of the same run and nothing
    else."""
    inner, outer = out.resolve(), run.resolve()
    if inner == outer or outer in inner.parents or inner in outer.parents:
        raise UserError(
            f"{out}: a release cannot lie in its run, nor the run in the release",
            "choose another --out",
        )
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return

    refused = UserError(f"{out}: exists and is not empty", "choose another --out")
    if not out.is_dir() or not (out / SUMS).is_file():
        raise refused

    try:
        earlier = json_files.read_object(out / provenance.LINEAGE)["model"]["fingerprint"]
        sums = (out / SUMS).read_text(encoding="utf-8").splitlines()
        listed = [line.split("  ", 1)[1] for line in sums]
    except (UserError, OSError, ValueError, KeyError, TypeError, IndexError):
        raise refused from None

    if earlier != runs.read_fingerprint(lineage.released.step.path):
        raise UserError(f"{out}: holds the release of another run", "choose another --out")

    for name in _list_files(out):
        if name not in (*listed, SUMS):
            raise UserError(
                f"{out}: holds a file that is no part of the release: {name}", "move it away"
            )
