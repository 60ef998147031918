"""What a finished run holds: written down when it is finished, and compared with the files before
they are used.

    COMPLETE    outputs: file -> SHA-256, of what the stage made
                records: the same of what the run says about itself (config.yaml, manifest.json,
                ...)
                files: file -> [bytes, time of its last change in nanoseconds]
                seconds; sum: SHA-256 of all this

Sizes and times are compared always. The content is read where a time differs, and of the smallest
files in any case, up to `CHEAP` bytes; of all, if that is asked for. So a copy with other times is
as good as the run, an edited file is not, and a corpus of terabytes costs no more than a look at
its directory.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from llama2 import atomic, devices
from llama2.errors import UserError, explain_os_errors
from llama2.hashing import hash_file
from llama2.reading import files
from llama2.runs.sealed import seal, unseal
from llama2.schema_version import migrate
from llama2.terminal_text import show_value

COMPLETE = "COMPLETE"
MANIFEST = "manifest.json"
METRICS = "metrics.jsonl"
WARNINGS = "warnings.json"
CONFIG = "config.yaml"
CHECKPOINTS = "checkpoints"
CHEAP = 256 << 20
"""bytes of a run that are read each time it is used: about a third of a second"""
SECOND = 1_000_000_000
_RECORDS = (CONFIG, MANIFEST, METRICS, WARNINGS)
_TRANSIENT = {CHECKPOINTS, COMPLETE, *_RECORDS}
_COMPARED = ".compared"  # sizes and times with which files of a copy were found to be the run's
_MOST = 10**12  # seconds, or cores, than which no run has more

Stamp = list[int]
"""bytes of a file, and the time of its last change in nanoseconds"""


class _Mark(BaseModel):
    """The form of COMPLETE."""

    model_config = ConfigDict(strict=True)
    outputs: dict[str, str]
    records: dict[str, str] = {}
    files: dict[str, Annotated[Stamp, Field(min_length=2, max_length=2)]] = {}
    seconds: Annotated[float, Field(ge=0, lt=_MOST)] | None = None


class _Manifest(BaseModel):
    """The form of manifest.json, as far as others read it."""

    model_config = ConfigDict(strict=True)
    verb: str = ""
    config: dict[str, Any] = {}
    inputs: dict[str, str] = {}
    ranks: int = Field(1, gt=0, lt=_MOST)
    threads: int = Field(1, gt=0, lt=_MOST)
    device: str = devices.CPU


# --- written down ---


def hash_contents(directory: Path) -> dict[str, str]:
    """Return the hash of every lasting file below a run directory, or any other."""
    return _hash_files(dict(_lasting(directory)))


def _lasting(directory: Path) -> Iterator[tuple[str, Path]]:
    for path in files.walk(directory, _TRANSIENT):
        if path.is_file() and not path.name.endswith(".tmp") and not path.name.startswith("."):
            yield path.relative_to(directory).as_posix(), path


def make_mark(run: Path, seconds: float) -> str:
    """Return the completion mark of a run, all of whose files are on the disk from now on."""
    outputs = dict(_lasting(run))
    records = {name: run / name for name in _RECORDS if (run / name).is_file()}
    with explain_os_errors(run):
        atomic.flush_all((outputs | records).values(), run)
        stamps = {name: _stamp(path) for name, path in (outputs | records).items()}

    return seal(
        {
            "outputs": _hash_files(outputs),
            "records": _hash_files(records),
            "files": stamps,
            "seconds": seconds,
        }
    )


def _hash_files(paths: Mapping[str, Path]) -> dict[str, str]:
    return {name: hash_file(path) for name, path in paths.items()}


def _stamp(path: Path) -> Stamp:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


# --- read ---


def read_mark(run: Path) -> dict[str, Any]:
    """Read the completion mark of a finished run, or of one of before, which has no `sum` and less
    in it."""
    values = unseal(run / COMPLETE, suggest_cure(run))
    if not isinstance(values.get("outputs"), dict):
        raise UserError(f"{run / COMPLETE}: damaged: it lists no outputs", suggest_cure(run))

    _check_form(_Mark, values, run / COMPLETE, suggest_cure(run))
    return values


def read_manifest(run: Path) -> dict[str, Any]:
    """Read what a run wrote down when it began, and runs of before less of it; UserError where it
    cannot be that."""
    mend = suggest_cure_unfinished(run)
    values = migrate(unseal(run / MANIFEST, mend), run / MANIFEST)
    _check_form(_Manifest, values, run / MANIFEST, mend)

    return values


def _check_form(form: type[BaseModel], values: Mapping[str, Any], path: Path, mend: str) -> None:
    try:
        form.model_validate(values)
    except ValidationError as error:
        name = str(error.errors()[0]["loc"][0])
        raise UserError(f"{path}: damaged: {name} is {show_value(values[name])}", mend) from None


def find_run(path: Path) -> Path | None:
    """Return the finished run that a path is, or lies in."""
    for directory in (path, *path.parents):
        if ".." in path.relative_to(directory).parts:
            return None
        if (directory / COMPLETE).is_file() and (directory / MANIFEST).is_file():
            return directory

    return None


def read_hashes(run: Path, inside: str = ".") -> dict[str, str]:
    """Return the hash of every output of a finished run, or of those at a path inside, as the run
    wrote it down."""
    outputs = read_mark(run)["outputs"]
    return {name: digest for name, digest in outputs.items() if _is_at(name, inside)}


# --- compared ---


def check(run: Path, inside: str = ".", but: Collection[str] = ()) -> dict[str, str]:
    """Return `read_hashes`, of files that are what the run wrote.

    UserError names one that is not, or does not belong there. Those with a name in `but` may have
    any content.
    """
    chosen = read_hashes(run, inside)
    _raise_first(
        chain(
            find_faults(run, {*chosen, MANIFEST}.difference(but)),
            _strangers(run, inside, chosen, but),
        )
    )
    return chosen


def check_whole(run: Path) -> None:
    """UserError if a finished run does not hold all that it wrote, unchanged."""
    _raise_first(find_faults(run))


def check_file(path: Path) -> None:
    """UserError for a file of a finished run that is not what the run wrote."""
    run = find_run(path)
    if run is not None:
        _raise_first(find_faults(run, {path.relative_to(run).as_posix()}))


def _raise_first(errors: Iterator[UserError]) -> None:
    for error in errors:
        raise error


@dataclass(frozen=True, order=True)
class _Unread:
    """A file of the right size whose content may have to be read."""

    size: int
    name: str
    changed: bool
    """it was touched since the run wrote it"""


def find_faults(
    run: Path, only: Collection[str] | None = None, *, thorough: bool = False
) -> Iterator[UserError]:
    """Give what is not as a finished run wrote it, of all files or of those named `only`. thorough:
    all content is read."""
    record = read_mark(run)
    digests = {**record["outputs"], **record.get("records", {})}
    written = record.get("files", {})
    compared = _compared(run)
    unread: list[_Unread] = []

    for name in sorted(digests if only is None else digests.keys() & only):
        path = run / name
        if not path.is_file():
            yield _fault(run, name, "missing, though this run wrote it")
            continue

        with explain_os_errors(path):
            stamp = _stamp(path)

        size, expected = stamp[0], written.get(name)
        if expected is not None and size != expected[0]:
            text = f"it has {size:,} bytes, and this run wrote {expected[0]:,}"
            yield _fault(run, name, text)
        else:
            changed = not _is_known(stamp, expected, compared.get(name))
            unread.append(_Unread(size, name, changed))

    yield from _differing(run, sorted(unread), digests, thorough)


def _is_known(stamp: Stamp, *records: Stamp | None) -> bool:
    """Tell whether size and time of a file are recorded, or the time without its fraction: file
    systems and archives that keep whole seconds cut that off."""
    known = [record for record in records if record is not None]
    whole_seconds = [[size, time // SECOND * SECOND] for size, time in known]
    return stamp in known or stamp in whole_seconds


def _differing(
    run: Path, unread: list[_Unread], digests: Mapping[str, str], thorough: bool
) -> Iterator[UserError]:
    """Give those of the unread files whose content is another one; remember what was read of a
    large copy."""
    left = CHEAP
    same: dict[str, Stamp] = {}
    for file in unread:
        if not (file.changed or thorough or file.size <= left):
            continue

        if not file.changed:
            left -= file.size

        if hash_file(run / file.name) != digests[file.name]:
            yield _fault(run, file.name, "its content is not what this run wrote")
        elif file.changed:
            same[file.name] = [file.size, (run / file.name).stat().st_mtime_ns]

    if sum(size for size, _ in same.values()) > CHEAP:
        with suppress(UserError):  # a place that cannot be written is read again each time
            atomic.write_atomic(run / _COMPARED, seal(_compared(run) | same))


def _compared(run: Path) -> dict[str, Any]:
    try:
        return unseal(run / _COMPARED, "")
    except UserError:  # or there is none
        return {}


def _strangers(
    run: Path, inside: str, chosen: Collection[str], but: Collection[str]
) -> Iterator[UserError]:
    """Give files that stand among the outputs and look like them, so that who reads the folder
    would read them too."""
    if not (run / inside).is_dir():
        return

    kinds = {(Path(name).parent, Path(name).suffix) for name in chosen}
    for name, path in _lasting(run):
        kind = Path(name).parent, Path(name).suffix
        if _is_at(name, inside) and kind in kinds and name not in (*chosen, *but):
            yield UserError(
                f"{path}: the run in {run} did not write this file", f"take it out of {run}"
            )


def _is_at(name: str, inside: str) -> bool:
    return inside == "." or name == inside or name.startswith(inside + "/")


def _fault(run: Path, name: str, text: str) -> UserError:
    way = "copy it out, and name the copy"
    if (run / "config.json").is_file():  # a model is its whole folder
        way = f"copy {run}, delete {COMPLETE} and {MANIFEST} in the copy, and name the copy"

    return UserError(
        f"{run / name}: {text}",
        f"{suggest_cure(run)}; a version of your own is used where it lies outside of runs: {way}",
    )


def suggest_cure(run: Path) -> str:
    """Say what to do about a finished run that is damaged."""
    return f"restore it, or delete {run} and repeat the command that made it"


def suggest_cure_unfinished(run: Path) -> str:
    """Say what to do about a damaged run that may not be finished."""
    return (
        suggest_cure(run)
        if (run / COMPLETE).is_file()
        else f"delete {run}: the same command starts over"
    )
