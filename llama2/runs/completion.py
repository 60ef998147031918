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

import hashlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

from llama2 import atomic, devices, json_files
from llama2.errors import UserError, explain_os_errors
from llama2.json_files import sha256
from llama2.reading import files
from llama2.records import dump
from llama2.terminal_text import shown

COMPLETE, MANIFEST, METRICS, WARNINGS = (
    "COMPLETE",
    "manifest.json",
    "metrics.jsonl",
    "warnings.json",
)
CONFIG, CHECKPOINTS = "config.yaml", "checkpoints"
CHEAP = 256 << 20
"""bytes of a run that are read each time it is used: about a third of a second"""
SECOND = 1_000_000_000
_RECORDS = (CONFIG, MANIFEST, METRICS, WARNINGS)
_TRANSIENT = {CHECKPOINTS, COMPLETE, *_RECORDS}
_COMPARED = ".compared"  # sizes and times with which files of a copy were found to be the run's
_SUM = "sum"
_MOST = 10**12  # seconds, or cores, than which no run has more


# --- a JSON object that tells whether it is whole
# -----------------------------------------------------------------


def seal(values: Mapping[str, Any]) -> str:
    """A JSON object with the hash of its content."""
    return dump({**values, _SUM: _sum(values)})


def unseal(path: Path, cure: str) -> dict[str, Any]:
    """What `seal` wrote, or any JSON object without such a hash; UserError with `cure` where it is
    damaged."""
    values = json_files.json_object(path, cure)
    expected = values.pop(_SUM, None)
    if expected is not None and expected != _sum(values):
        raise UserError(f"{path}: damaged: its content does not fit its checksum", cure)

    return values


def _sum(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(dump(values).encode()).hexdigest()


# --- written down
# -------------------------------------------------------------------------------------------------


def contents(directory: Path) -> dict[str, str]:
    """Hash of every lasting file below a run directory, or any other."""
    return {name: sha256(path) for name, path in _lasting(directory)}


def _lasting(directory: Path) -> Iterator[tuple[str, Path]]:
    for path in files.walk(directory, _TRANSIENT):
        if path.is_file() and not path.name.endswith(".tmp") and not path.name.startswith("."):
            yield path.relative_to(directory).as_posix(), path


def mark(run: Path, seconds: float) -> str:
    """The completion mark of a run, all of whose files are on the disk from now on."""
    made = dict(_lasting(run))
    papers = {name: run / name for name in _RECORDS if (run / name).is_file()}
    with explain_os_errors(run):
        atomic.flush_all((made | papers).values(), run)
        known = {
            name: [path.stat().st_size, path.stat().st_mtime_ns]
            for name, path in (made | papers).items()
        }

    return seal(
        {
            "outputs": {name: sha256(path) for name, path in made.items()},
            "records": {name: sha256(path) for name, path in papers.items()},
            "files": known,
            "seconds": seconds,
        }
    )


# --- compared
# -----------------------------------------------------------------------------------------------------


def home(path: Path) -> Path | None:
    """The finished run that a path is, or lies in."""
    return next(
        (
            directory
            for directory in (path, *path.parents)
            if ".." not in path.relative_to(directory).parts
            and (directory / COMPLETE).is_file()
            and (directory / MANIFEST).is_file()
        ),
        None,
    )


def recorded(run: Path, inside: str = ".") -> dict[str, str]:
    """The hash of every output of a finished run, or of those at a path inside, as the run wrote it
    down."""
    return {
        name: digest for name, digest in completed(run)["outputs"].items() if _is_at(name, inside)
    }


def check(run: Path, inside: str = ".", but: Collection[str] = ()) -> dict[str, str]:
    """`recorded`, of files that are what the run wrote; UserError names one that is not, or does
    not belong there. What is called as in `but` may be of any content."""
    chosen = recorded(run, inside)
    for fault in chain(
        faults(run, {*chosen, MANIFEST}.difference(but)), _strangers(run, inside, chosen, but)
    ):
        raise fault

    return chosen


def check_whole(run: Path) -> None:
    """UserError if a finished run does not hold all that it wrote, unchanged."""
    for fault in faults(run):
        raise fault


def check_file(path: Path) -> None:
    """UserError for a file of a finished run that is not what the run wrote."""
    run = home(path)
    if run is not None:
        for fault in faults(run, {path.relative_to(run).as_posix()}):
            raise fault


def faults(
    run: Path, only: Collection[str] | None = None, *, thorough: bool = False
) -> Iterator[UserError]:
    """What is not as a finished run wrote it, of all files or of those named `only`. thorough: all
    content is read."""
    said = completed(run)
    digests = {**said["outputs"], **said.get("records", {})}
    written, compared = said.get("files", {}), _compared(run)
    waiting: list[tuple[int, str, bool]] = []

    for name in sorted(digests if only is None else digests.keys() & only):
        if not (run / name).is_file():
            yield _fault(run, name, "missing, though this run wrote it")
            continue

        with explain_os_errors(run / name):
            status = (run / name).stat()

        found = [status.st_size, status.st_mtime_ns]
        if name in written and found[0] != written[name][0]:
            yield _fault(
                run, name, f"it has {found[0]:,} bytes, and this run wrote {written[name][0]:,}"
            )
        else:
            waiting.append(
                (found[0], name, not _is_known(found, written.get(name), compared.get(name)))
            )

    yield from _differing(run, sorted(waiting), digests, thorough)


def _is_known(found: list[int], *records: list[int] | None) -> bool:
    """Whether size and time of a file are recorded, or the time without its fraction: file systems
    and archives that keep whole seconds cut that off."""
    whole = [[record[0], record[1] // SECOND * SECOND] for record in records if record is not None]
    return found in (*records, *whole)


def _differing(
    run: Path, waiting: list[tuple[int, str, bool]], digests: Mapping[str, str], thorough: bool
) -> Iterator[UserError]:
    """Those of the waiting files (size, name, whether its time differs) whose content is another
    one."""
    left, same = CHEAP, {}
    for size, name, changed in waiting:
        if not (changed or thorough or size <= left):
            continue

        if not changed:
            left -= size

        if sha256(run / name) != digests[name]:
            yield _fault(run, name, "its content is not what this run wrote")
        elif changed:
            same[name] = [size, (run / name).stat().st_mtime_ns]

    if sum(size for size, _ in same.values()) > CHEAP:
        with suppress(UserError):  # a place that cannot be written is read again each time
            atomic.write_atomic(run / _COMPARED, seal(_compared(run) | same))


def _compared(run: Path) -> dict[str, Any]:
    try:
        return unseal(run / _COMPARED, "") if (run / _COMPARED).is_file() else {}
    except UserError:
        return {}


def _strangers(
    run: Path, inside: str, chosen: Collection[str], but: Collection[str]
) -> Iterator[UserError]:
    """Files that stand among the outputs and look like them, so that who reads the folder would
    read them too."""
    if (run / inside).is_dir():
        kinds = {(Path(name).parent, Path(name).suffix) for name in chosen}
        for name, path in _lasting(run):
            place = Path(name)
            if (
                _is_at(name, inside)
                and name not in (*chosen, *but)
                and (place.parent, place.suffix) in kinds
            ):
                yield UserError(
                    f"{path}: the run in {run} did not write this file", f"take it out of {run}"
                )


def completed(run: Path) -> dict[str, Any]:
    """The completion mark of a finished run, or of one of before, which has no `sum` and less in
    it."""
    found = unseal(run / COMPLETE, cure(run))
    if not isinstance(found.get("outputs"), dict):
        raise UserError(f"{run / COMPLETE}: damaged: it lists no outputs", cure(run))

    known = {"records": {}, "files": {}, "seconds": None} | found
    for name, fits in (
        ("outputs", _are_texts),
        ("records", _are_texts),
        ("files", _are_sizes),
        ("seconds", _is_time),
    ):
        if not fits(known[name]):
            raise UserError(f"{run / COMPLETE}: damaged: {name} is {shown(known[name])}", cure(run))

    return found


def manifest(run: Path) -> dict[str, Any]:
    """What a run wrote down when it began, and runs of before less of it; UserError where it cannot
    be that."""
    whole = (
        cure(run) if (run / COMPLETE).is_file() else f"delete {run}: the same command starts over"
    )
    found = unseal(run / MANIFEST, whole)
    known = {
        "verb": "",
        "config": {},
        "inputs": {},
        "ranks": 1,
        "threads": 1,
        "device": devices.CPU,
    } | found

    for name, fits in (
        ("verb", _is_text),
        ("config", _is_mapping),
        ("inputs", _are_texts),
        ("ranks", _is_count),
        ("threads", _is_count),
        ("device", _is_text),
    ):
        if not fits(known[name]):
            raise UserError(f"{run / MANIFEST}: damaged: {name} is {shown(known[name])}", whole)

    return found


def _is_mapping(value: Any) -> bool:
    return isinstance(value, dict)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 < value < _MOST


def _is_time(value: Any) -> bool:
    return value is None or (type(value) in (int, float) and 0 <= value < _MOST)


def _are_texts(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_text, value.values()))


def _are_sizes(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(pair, list) and len(pair) == 2 and all(type(one) is int for one in pair)
        for pair in value.values()
    )


def _is_at(name: str, inside: str) -> bool:
    return inside == "." or name == inside or name.startswith(inside + "/")


def _fault(run: Path, name: str, what: str) -> UserError:
    way = "copy it out, and name the copy"
    if (run / "config.json").is_file():  # a model is its whole folder
        way = f"copy {run}, delete {COMPLETE} and {MANIFEST} in the copy, and name the copy"

    return UserError(
        f"{run / name}: {what}",
        f"{cure(run)}; a version of your own is used where it lies outside of runs: {way}",
    )


def cure(run: Path) -> str:
    """What to do about a finished run that is damaged."""
    return f"restore it, or delete {run} and repeat the command that made it"
