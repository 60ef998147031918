"""`llama2 release RUN --out DIR`: a model with the papers a responsible release needs (§5.3,
appendix A.7).

The same run and the same settings give the same bytes, wherever and whenever: no file names a time,
a machine, a user or a directory of it. SHA256SUMS is written last, and the whole appears at once or
not at all.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator

from llama2 import atomic, json_files, runs
from llama2.config import Config as Section
from llama2.convert.export import Kind
from llama2.errors import UserError, explain_os_errors
from llama2.formats import hf_directory
from llama2.formats.gguf_metadata import Precision
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
from llama2.release.measurements import measured
from llama2.report.carbon import Power
from llama2.terminal_text import say

POSITIONAL = "run"
SUMS = "SHA256SUMS"
_DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


def _several(value: Any) -> Any:
    """`f16,q8_0` as a list, also as one word of a list."""
    words = [value] if isinstance(value, str) else value
    return (
        tuple(part for word in words for part in word.split(",") if part)
        if _are_texts(words)
        else value
    )


def _are_texts(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(word, str) for word in value)


class Config(Section):
    """Release a model: its weights, a model card, its carbon, licences, limits, and how it was
    made."""

    run: Path
    """directory of a finished run that holds a model"""
    out: Path
    """directory of the release; one that holds an earlier release of the same run is replaced"""
    dtype: Kind | None = None
    """type of the weights; without it, the run's own files"""
    gguf: Annotated[tuple[Precision, ...], BeforeValidator(_several)] = ()
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

    with _fresh(config.out) as work:
        fill(config, lineage, work)

    count = len((config.out / SUMS).read_text(encoding="utf-8").splitlines())
    say(f"{config.out}: {count} files and their checksums")
    if client is not None and config.push is not None:
        hub.push(config.out, config.push, client, private=config.private, sure=config.yes)

    print(config.out)


def fill(config: Config, lineage: Lineage, work: Path) -> None:
    """Write everything into an empty directory, the checksums last."""
    found = measured(lineage)
    materials = licences.materials(lineage, config.licenses)
    weight_files.write(lineage.released, work, config.dtype)
    settings = json_files.json_object(work / hf_directory.CONFIG)
    dtype = _DTYPES.get(str(settings.get("dtype", settings.get("torch_dtype"))), "not stated")
    model = cards.Model(
        lineage, found, materials, config.card, config.power, dtype, config.dtype is not None
    )
    copies = weight_files.write_gguf(lineage.released, work, config.gguf, model.title)
    model = cards.Model(
        lineage,
        found,
        materials,
        config.card,
        config.power,
        dtype,
        config.dtype is not None,
        copies,
    )
    papers = {
        cards.FILE: cards.document(model),
        responsible_use.FILE: responsible_use.document(model),
        carbon_statement.FILE: carbon_statement.document(lineage, found, config.power),
        carbon_statement.NUMBERS: carbon_statement.numbers(lineage, config.power),
        licences.FILE: licences.document(
            lineage, materials, config.card.license, config.card.base_model
        ),
        **provenance.files(lineage, found),
    }

    for name, text in papers.items():
        atomic.write_atomic(work / name, text)

    (work / provenance.SCRIPT).chmod(0o755)
    _check_private(work, config.run)
    (work / SUMS).write_text(sums(work), encoding="utf-8")


def sums(release: Path) -> str:
    """One line for every file but SHA256SUMS, sorted, as sha256sum reads them."""
    names = sorted(
        path.relative_to(release).as_posix() for path in release.rglob("*") if path.is_file()
    )
    return "".join(
        f"{json_files.sha256(release / name)}  {name}\n" for name in names if name != SUMS
    )


def _check_private(work: Path, run: Path) -> None:
    """No paper may name the home directory or where the run lies; what a person wrote is no
    exception."""
    for file in sorted(
        path for path in work.rglob("*") if path.suffix in (".md", ".json", ".yaml", ".sh")
    ):
        text = file.read_text(encoding="utf-8")
        for place in provenance.places(run):
            if place in text:
                raise UserError(
                    f"{file.relative_to(work)} would name the directory {place}",
                    "take it out of "
                    "--card.notes and the other --card settings, and out of the names in the recipe",
                )


# ---- where it goes
# --------------------------------------------------------------------------------------------------
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
        earlier = json_files.json_object(out / provenance.LINEAGE)["model"]["fingerprint"]
        told = {
            line.split("  ", 1)[1] for line in (out / SUMS).read_text(encoding="utf-8").splitlines()
        }
    except (UserError, OSError, ValueError, KeyError, TypeError, IndexError):
        raise refused from None

    if earlier != runs.recorded(lineage.released.step.path):
        raise UserError(f"{out}: holds the release of another run", "choose another --out")
    if foreign := sorted(
        path.relative_to(out).as_posix()
        for path in out.rglob("*")
        if path.is_file() and path.relative_to(out).as_posix() not in {*told, SUMS}
    ):
        raise UserError(
            f"{out}: holds a file that is no part of the release: {foreign[0]}", "move it away"
        )


@contextmanager
def _fresh(out: Path) -> Iterator[Path]:
    """A directory beside `out` that takes its place at the end, and vanishes if there is an
    error."""
    target = out.resolve()
    work, old = (target.with_name(f".{target.name}.{end}") for end in ("tmp", "old"))
    with explain_os_errors(out):
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        try:
            yield work
            atomic.flush_tree(work)
            if target.exists():
                os.replace(target, old)

            atomic.replace(work, target)
        finally:
            shutil.rmtree(work, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)
