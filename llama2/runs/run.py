"""Run directories: what was asked, what it was made from, and whether it is finished.

    <out>/config.yaml      the resolved configuration
    <out>/manifest.json    verb, seed, code version, fingerprints of all inputs, machine
    <out>/metrics.jsonl    one line a logged step
    <out>/warnings.json    what the user was warned of, a list of lines; absent if of nothing
    <out>/COMPLETE         written last: fingerprints of the outputs (`outputs`), seconds

A finished run is skipped; an unfinished one is resumed; one whose configuration or inputs have
changed is refused and the difference is named, unless it has done nothing yet: a mistake found at
the start may be mended. One process writes a run at a time (an advisory lock). Only rank 0 touches
the disk.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import IO, Any

import torch

import llama2
from llama2 import atomic, environment, interrupts, json_files
from llama2.config import StageConfig, incidentals, paths, yaml12
from llama2.errors import UserError, explain_os_errors
from llama2.ranks import Ranks
from llama2.reading import files
from llama2.records import dump
from llama2.runs import completion
from llama2.tally import Tally
from llama2.terminal_text import say

COMPLETE, MANIFEST, METRICS, WARNINGS = (
    completion.COMPLETE,
    completion.MANIFEST,
    completion.METRICS,
    completion.WARNINGS,
)
SECONDS = ".seconds"  # time spent by earlier, interrupted attempts
CHECKPOINTS = completion.CHECKPOINTS  # needed until the run is complete, deleted after
_CHECKPOINT = re.compile(r"(\.partial-|\.discarded-)?step-\d+|parts|answers|best")
# names of keys, in every stage
_MODELS = {"model", "policy", "critic", "candidate", "predecessor", "helpful", "safe"}
_MODELS_BY_NAME = {"versions", "policies"}
_NO_LOCKS = (
    errno.ENOSYS,
    errno.ENOLCK,
    errno.EOPNOTSUPP,
    errno.EINVAL,
    errno.ENOTTY,
    errno.EACCES,
    errno.EPERM,
)
"""how file systems (NFS, FUSE, 9p) and containers say that there are no locks"""
_FIRST = ("config.yaml", MANIFEST, SECONDS, WARNINGS)
_BEGUN = {".lock", SECONDS, *(f"{name}{end}" for name in _FIRST for end in ("", ".tmp"))}
write_atomic, sha256 = atomic.write_atomic, json_files.sha256


class Stopped(Exception):
    """Training was asked to stop and has saved its state: no failure, but Ctrl-C (`interrupted`)
    ends scripts too."""

    def __init__(self, step: int, checkpoint: Path | None, interrupted: bool = False) -> None:
        self.step, self.checkpoint = step, checkpoint
        self.exit_code = interrupts.STATUS if interrupted else 0
        super().__init__(
            f"stopped after step {step}; the same command resumes"
            if checkpoint
            else f"stopped after step {step}, nothing was saved"
        )


def fingerprint(path: Path) -> str:
    """What `path` contains: of a finished run its outputs, of a file or other directory its
    content; of a glob all that of what it matches. UserError names an output that is not what its
    run wrote."""
    found = files.matches(path)
    if files.is_pattern(path):
        fixed = files.fixed(path)
        return _digest({each.relative_to(fixed).as_posix(): _fingerprint(each) for each in found})

    return _fingerprint(found[0])


def _was_fingerprint(path: Path) -> str | None:
    """What earlier versions took for the fingerprint of a glob: it held where the files lie."""
    if not files.is_pattern(path):
        return None

    return _digest({str(each): _fingerprint(each) for each in files.matches(path)})


def recorded(run: Path, inside: str = ".") -> str:
    """The fingerprint of what a finished run wrote, or of a path inside, whatever has become of
    it."""
    return _digest(completion.recorded(run, inside))


def _fingerprint(path: Path) -> str:
    run = completion.home(path)
    if run is not None:
        inside = path.relative_to(run).as_posix()
        chosen = completion.check(run, inside)
        if chosen or inside == ".":  # anything else was put there by somebody
            return _digest(chosen)

    if path.is_file():
        return sha256(path)
    if not path.is_dir():
        raise UserError(
            f"{path}: a pipe or a device, of which nobody can tell later what was read",
            "write it to a file first",
        )
    if (path / MANIFEST).is_file():
        raise UserError(f"{path}: this run is not finished", "finish it first: repeat its command")

    return _digest(completion.contents(path))


def _inputs(config: StageConfig) -> dict[str, str]:
    """The fingerprint of every input. A folder where a model should be is looked into before it is
    read through."""
    named = dict(paths(config))
    for key, path in named.items():
        *_, above, last = ("", *key.split("."))
        if last in _MODELS or (above in _MODELS_BY_NAME and last != "path"):
            place = files.at_home(path)
            if place.is_dir() and not any(
                (place / file).is_file() for file in (MANIFEST, "config.json")
            ):
                adapter = (place / "adapter_config.json").is_file()
                raise UserError(
                    f"{path}: config.json: missing, so this folder holds no model",
                    f"it is a PEFT adapter: `llama2 import {path} --base BASE --out MODEL` joins it to "
                    "its base"
                    if adapter
                    else f"give a checkpoint directory as {key}",
                )

    return {key: fingerprint(path) for key, path in named.items()}


def is_output(path: Path) -> bool:
    """Whether a finished run wrote `path`: such a file may be empty, because nothing passed the
    stage's gate."""
    return completion.home(path.parent) is not None


def _digest(value: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@cache
def code_version() -> str:
    """Package version, a hash of its source, and what was switched off: two runs with the same
    value ran the same code.
    """
    root = Path(llama2.__file__).parent
    digest = hashlib.sha256()
    for file in sorted(path for path in root.rglob("*") if path.suffix in (".py", ".cpp", ".h")):
        digest.update(file.relative_to(root).as_posix().encode() + file.read_bytes())

    return f"{llama2.__version__}+{digest.hexdigest()[:12]}{'' if environment.native() else '.nonative'}"


class Run:
    """An open run directory."""

    def __init__(self, path: Path, finished: bool, ranks: Ranks | None = None) -> None:
        self.path, self.finished = path, finished
        self.ranks = ranks or Ranks.alone()
        self.tallies: dict[str, Tally] = {}
        self.warnings: list[str] = []
        self.results: list[str] = []
        self._metrics: IO[str] | None = None

    def tally(self, name: str) -> Tally:
        """The counts of one set of records that this run reads; what they come to is said when the
        run ends."""
        return self.tallies.setdefault(name, Tally())

    def warn(self, line: str) -> None:
        """Say, and keep in warnings.json, what makes this run worth less than its user may think
        (rank 0)."""
        if line not in self.warnings:
            self.warnings.append(line)
            self._say(f"warning: {line}")
            self.write_json(WARNINGS, self.warnings)

    def conclude(self, line: str) -> None:
        """Have `line`, what this run came to, said when it ends: last, after its counts."""
        self.results.append(line)

    def end(self) -> None:
        """Say what was read, kept and left out, and what the run came to (rank 0)."""
        counts = (f"{name}: {tally.line()}" for name, tally in self.tallies.items() if tally.read)
        for line in (*counts, *self.results):
            self._say(line)

    def _say(self, line: str) -> None:
        if self.ranks.is_main:
            say(f"{self.path}: {line}")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line of metrics (rank 0)."""
        if not self.ranks.is_main:
            return

        with explain_os_errors(self.path / METRICS):
            if self._metrics is None:
                self._metrics = open(self.path / METRICS, "a", encoding="utf-8")  # noqa: SIM115

            self._metrics.write(json.dumps({"step": step, **metrics}) + "\n")
            self._metrics.flush()

    def rewind(self, step: int) -> None:
        """Forget metrics logged after `step`, when resuming from a checkpoint taken there."""
        self.close()
        file = self.path / METRICS
        if self.ranks.is_main and file.exists():
            with explain_os_errors(file):
                lines = file.read_bytes().split(b"\n")

            rows = [_row(line) for line in lines]
            if damaged := rows[:-1].count(None):  # the last is what a crash cut off, or nothing
                self._say(
                    f"{METRICS}: damaged: {damaged} lines of it cannot be read and are left out"
                )

            kept = [
                line for line, row in zip(lines, rows) if row is not None and row["step"] <= step
            ]
            write_atomic(file, b"".join(line + b"\n" for line in kept))

    def write_json(self, name: str, value: object) -> None:
        """Write `value` as a JSON file of the run (rank 0)."""
        if self.ranks.is_main:
            write_atomic(self.path / name, dump(value))

    def close(self) -> None:
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None


def read_warnings(path: Path) -> list[str]:
    """What the user of a run was warned of."""
    file = path / WARNINGS
    return read_list(file, completion.cure(path)) if file.is_file() else []


def read_list(file: Path, cure: str) -> list[str]:
    """The texts in a JSON file; UserError with `cure` where it is damaged."""
    found: list[str] = json_files.json_list(file, cure)
    if not all(isinstance(line, str) for line in found):
        raise UserError(f"{file}: damaged: a list of texts was expected", cure)

    return found


def _row(line: bytes) -> dict[str, float] | None:
    """A line of metrics; None for one that is not whole."""
    try:
        found = json_files.parsed(line)
    except ValueError:
        return None

    if not isinstance(found, dict) or not all(
        isinstance(value, (int, float)) for value in found.values()
    ):
        return None

    return found if math.isfinite(found.get("step", math.nan)) else None


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The metrics a run logged, [] where it logged none; a line that is not whole is left out."""
    file = path / METRICS
    if not file.exists():
        return []

    with explain_os_errors(file):
        return [row for line in file.read_bytes().split(b"\n") if (row := _row(line)) is not None]


@contextmanager
def open_run(verb: str, config: StageConfig, ranks: Ranks | None = None) -> Iterator[Run]:
    """Open `config.out` for one stage; mark it complete when the block ends without an
    exception."""
    path, ranks = config.out, ranks or Ranks.alone()
    new = [place for place in (path, *path.parents) if not place.exists()]
    held = lock(path) if ranks.is_main else None

    try:
        finished = ranks.broadcast(_prepare(verb, config, ranks) if ranks.is_main else False)
        run, begin = Run(path, finished, ranks), time.monotonic()
        if finished:
            if ranks.is_main:
                say(f"{path}: already finished, skipped")
                # it may have died behind its completion mark
                _remove_checkpoints(path / CHECKPOINTS)
                (path / SECONDS).unlink(missing_ok=True)

            yield run
            return

        if ranks.is_main:
            # an attempt that was given up may have had another configuration
            (path / WARNINGS).unlink(missing_ok=True)

        spent = _spent(path / SECONDS) if ranks.is_main else 0.0
        try:
            yield run
        except BaseException:
            if ranks.is_main:
                with suppress(UserError):  # on a full disk what stopped the run is what counts
                    write_atomic(path / SECONDS, f"{spent + time.monotonic() - begin:.2f}")

            raise
        finally:
            run.close()

        ranks.barrier()
        if ranks.is_main:  # the completion mark, last of all
            write_atomic(
                path / COMPLETE, completion.mark(path, round(spent + time.monotonic() - begin, 2))
            )
            (path / SECONDS).unlink(missing_ok=True)
            _remove_checkpoints(path / CHECKPOINTS)
            run.end()

        ranks.barrier()
    except UserError:
        if held is not None and _only_begun(path):
            _clear(path, new)
        elif held is not None and not (path / MANIFEST).is_file():  # it is no run directory
            (path / ".lock").unlink(missing_ok=True)

        raise
    finally:
        if held is not None:
            held.close()


def _spent(file: Path) -> float:
    """Seconds that earlier attempts took; 0 where that is not known."""
    try:
        seconds = float(file.read_text("utf-8")) if file.is_file() else 0.0
        if math.isfinite(seconds) and seconds >= 0:
            return seconds
    except (OSError, ValueError):
        pass

    print(f"{file}: damaged: how long earlier attempts took is not counted", file=sys.stderr)
    return 0.0


def _remove_checkpoints(folder: Path) -> None:
    """Delete what a run needed until its end.

    Where the folder, or one in it, was moved to another disk and linked, what the run itself wrote
    there is deleted.
    """
    for path in [*folder.iterdir()] if folder.is_dir() else []:
        linked = folder.is_symlink() or path.is_symlink()
        if path.is_dir() and (not linked or _CHECKPOINT.fullmatch(path.name)):
            shutil.rmtree(path.resolve(), ignore_errors=True)

    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder, ignore_errors=True)

    if folder.exists():
        print(f"{folder}: could not be deleted, and is no longer needed", file=sys.stderr)


def _clear(path: Path, new: Sequence[Path]) -> None:
    """Take away what was begun in a run directory that holds nothing else, and the directories made
    for it."""
    for file in path.rglob("*"):
        if file.is_file() or file.is_symlink():
            file.unlink()

    for directory in sorted((place for place in path.rglob("*") if place.is_dir()), reverse=True):
        directory.rmdir()

    with suppress(OSError):  # somebody else has put something there
        for place in new:
            place.rmdir()


def check(verb: str, config: StageConfig) -> None:
    """Refuse a configuration that differs from that of the run in `config.out`, if there is one."""
    path = config.out
    if (path / MANIFEST).is_file() and not _only_begun(path):
        old = _manifest(path)
        differences = (
            [f"verb: {old['verb']} -> {verb}"]
            if old["verb"] != verb
            else _differences(
                old["config"],
                _asked(config),
                {*incidentals(config), *_around(config)},
                dict(paths(config)),
            )
        )
        if differences:
            raise UserError(
                f"{path}: holds {_state(path)} with another configuration: {'; '.join(differences)}",
                "choose another --out, or delete that directory to start over",
            )


def is_finished(verb: str, config: StageConfig) -> bool:
    """Whether `config.out` holds this very run, complete; a changed configuration or input is
    refused as ever."""
    return (config.out / COMPLETE).is_file() and _prepare(verb, config, Ranks.alone())


def lock(path: Path) -> IO[str]:
    """Make the directory this process's own until the file returned is closed; UserError if another
    has it."""
    with explain_os_errors(path):
        atomic.make(path)
        held = open(path / ".lock", "a+", encoding="utf-8")  # noqa: SIM115

    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.fstat(held.fileno()).st_nlink:  # whoever held it has just cleared the directory
            held.close()
            return lock(path)
    except BlockingIOError:
        held.seek(0)
        owner = held.read().strip()
        held.close()
        raise UserError(
            f"{path}: another process{f' (pid {owner})' if owner else ''} is writing this run",
            "wait for it, or choose another --out",
        ) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            held.close()
            with explain_os_errors(path):
                raise

        print(
            f"{path}: this file system has no locks, so nothing keeps a second process from writing this run",
            file=sys.stderr,
        )

    # a courtesy to whoever asks for the lock: a full disk is named when a file needs it
    with suppress(OSError):
        os.truncate(held.fileno(), 0)
        os.write(held.fileno(), str(os.getpid()).encode())

    return held


def _prepare(verb: str, config: StageConfig, ranks: Ranks) -> bool:
    """Compare with what is there, record what is asked; True if there is nothing left to do."""
    check(verb, config)
    path, asked = config.out, _asked(config)
    inputs = _inputs(config)
    finished = (path / COMPLETE).is_file()

    if (path / MANIFEST).is_file() and not _only_begun(path):
        old = _manifest(path)
        named = dict(paths(config))
        changed = [
            key
            for key in inputs
            if old["inputs"].get(key)
            not in (inputs[key], _was_fingerprint(files.at_home(named[key])))
        ]

        if changed:
            which = ", ".join(f"{key} ({named[key]})" for key in changed)
            raise UserError(
                f"{path}: holds {_state(path)} made from other inputs; changed: {which}",
                "choose another --out, or delete that directory to start over",
            )

        if finished:
            completion.check_whole(path)
        else:
            _resume(path, old, asked)

        return finished

    if finished:
        raise UserError(
            f"{path / MANIFEST}: missing, though this run is finished", completion.cure(path)
        )
    if not _only_begun(path):
        raise UserError(f"{path}: exists and is no run directory", "choose another --out")

    write_atomic(path / "config.yaml", yaml12.dump(asked))
    write_atomic(
        path / MANIFEST,
        completion.seal(
            {
                "verb": verb,
                "config": asked,
                "inputs": inputs,
                "seed": config.seed,
                "code": code_version(),
                "torch": torch.__version__,
                "python": platform.python_version(),
                "machine": platform.processor(),
                "device": ranks.device.type,
                "ranks": ranks.size,
                "threads": torch.get_num_threads(),
                "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            }
        ),
    )
    return False


def _manifest(path: Path) -> dict[str, Any]:
    """What a run wrote down when it began, all that it is known by."""
    found = completion.manifest(path)
    if not {"verb", "config", "inputs"} <= found.keys():
        raise UserError(
            f"{path / MANIFEST}: damaged: it does not say what the run is of",
            completion.cure(path)
            if (path / COMPLETE).is_file()
            else f"delete {path}: the same command starts over",
        )

    return found


def _resume(path: Path, old: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Say that a run goes on, and what is not as it was."""
    print(f"{path}: resuming", file=sys.stderr)
    if old.get("code") != code_version():
        print(
            f"{path}: it was begun by other code, {old.get('code')}, and goes on with {code_version()}",
            file=sys.stderr,
        )

    file = path / "config.yaml"
    try:
        whole = yaml12.read_yaml(file) in (old["config"], asked)
    except UserError:
        whole = False

    if not whole:
        print(f"{file}: damaged; written again", file=sys.stderr)
        write_atomic(file, yaml12.dump(asked))


def _only_begun(path: Path) -> bool:
    """Whether a run directory holds nothing that a stage made, but for directories without a
    file."""
    return all(
        file.name in _BEGUN
        or (file.is_dir() and not any(inside.is_file() for inside in file.rglob("*")))
        for file in path.iterdir()
    )


def _asked(config: StageConfig) -> dict[str, Any]:
    return config.model_dump(mode="json", exclude={"out"})


def _state(path: Path) -> str:
    return "a finished run" if (path / COMPLETE).is_file() else "an unfinished run"


def _around(config: StageConfig) -> set[str]:
    """The keys that name a directory around `out`: it may be moved, with the run in it."""
    out = config.out.resolve()
    return {
        key for key in config.around if out.is_relative_to(Path(getattr(config, key)).resolve())
    }


def _differences(
    old: Any, new: Any, ignored: Collection[str], inputs: Mapping[str, Path], key: str = ""
) -> list[str]:
    """What was asked and what is, where that differs. Inputs are compared elsewhere, by what they
    hold: they, and the run with them, may lie at another place than they did."""
    pairs: list[tuple[str, Any, Any]] = []
    if isinstance(old, dict) and isinstance(new, dict):
        pairs = [
            (f"{key}.{name}" if key else name, old.get(name), new.get(name))
            for name in sorted({*old, *new})
        ]
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = [(f"{key}.{index}", *both) for index, both in enumerate(zip(old, new))]
    elif (
        old == new
        or key in ignored
        or (isinstance(old, str) and key in inputs and _is_named(inputs[key], old))
    ):
        return []
    else:
        return [f"{key}: {old} -> {new}"]

    return [
        line
        for name, was, is_now in pairs
        for line in _differences(was, is_now, ignored, inputs, name)
    ]


def _is_named(path: Path, old: str) -> bool:
    """Whether an input is called as before, wherever it lies; the name of a file tells how it is
    read."""
    return not path.is_file() or path.name == Path(old).name
