"""The weights of a release: a run's own files, checked against what the run recorded, and copies in
other formats."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from llama2.convert import verify
from llama2.convert.export import DTYPES, ROUNDING, Kind
from llama2.errors import UserError, explain_os_errors
from llama2.formats import gguf, hf
from llama2.formats.detect import open_model
from llama2.formats.gguf_metadata import Precision
from llama2.formats.hf_directory import BESIDE, is_model_file
from llama2.formats.stored_model import StoredModel
from llama2.hashing import hash_file
from llama2.release.lineage import Stage

GGUF = "gguf"
_ROUNDING = ROUNDING | {"f32": ROUNDING["fp32"], "f16": ROUNDING["fp16"]}


def list_files(run: Path) -> list[str]:
    """List the files that make up the model in a run directory."""
    files = sorted(path.name for path in run.iterdir() if path.is_file())
    return [name for name in files if is_model_file(name)]


def check(stage: Stage) -> None:
    """Check that every file of the model is there and has the checksum that its run recorded, else
    UserError."""
    outputs, run = stage.step.recorded, stage.step.path
    recorded = [name for name in outputs if is_model_file(name)]
    for name in sorted({*list_files(run), *recorded}):
        if not (run / name).is_file():
            raise UserError(
                f"{run / name}: missing, though the run wrote it",
                "restore the file, or repeat the run",
            )
        if name not in outputs:
            raise UserError(
                f"{run / name}: the run did not write this file", "take it out of the run directory"
            )
        if hash_file(run / name) != outputs[name]:
            raise UserError(
                f"{run / name}: its checksum differs from what the run recorded",
                "restore the file, or repeat the run: what was measured is not this model",
            )


def write(stage: Stage, directory: Path, dtype: Kind | None) -> None:
    """Write the model in Hugging Face's format: the run's own files, or the weights as `dtype` with
    the files beside them."""
    run = stage.step.path
    for name in list_files(run):
        if dtype is None or name in BESIDE:
            with explain_os_errors(directory / name):
                shutil.copyfile(run / name, directory / name)

    if dtype is not None:
        source = hf.read(run)
        hf.write(source, directory, dtype=DTYPES[dtype])
        check_copy(source, directory, dtype)


def write_gguf(
    stage: Stage, directory: Path, precisions: Sequence[Precision], title: str
) -> dict[str, list[str]]:
    """Write GGUF copies; return what differs in each, by its name relative to `directory`, from
    what was asked for."""
    if not precisions:
        return {}

    source, differences = hf.read(stage.step.path), {}
    for precision in precisions:
        name = f"{GGUF}/{make_slug(title)}-{precision}.gguf"
        (directory / name).parent.mkdir(exist_ok=True)
        differences[name] = gguf.write(
            source,
            directory / name,
            precision=precision,
            name=title,
            chat_template=source.template,
        )
        check_copy(source, directory / name, precision)

    return differences


def check_copy(source: StoredModel, copy: Path, kind: str) -> None:
    """Read a copy again, and check that it is no further from its source than rounding to its kind
    of numbers explains; else RuntimeError."""
    comparison = verify.compare_models(source, open_model(copy), length=0, tolerance=math.inf)
    distance = comparison.tensors.relative if comparison.tensors else math.inf
    faults = comparison.differences(math.inf)

    if distance > _ROUNDING[kind]:
        faults.append(
            f"numbers differ by {distance:.3g} of a tensor's largest, "
            f"and {kind} explains {_ROUNDING[kind]:.3g}"
        )

    if faults:
        raise RuntimeError(f"{copy.name} is not the model it was made from: {faults[0]}")


def make_slug(title: str) -> str:
    """Return a title as part of a file's name."""
    return re.sub(r"[^a-z0-9._]+", "-", title.lower()).strip("-.") or "model"
