"""Checkpoints of a run in progress: exact, atomic, and deletable.

    <run>/checkpoints/step-00000100/           the model, as `save_model` writes it (a Hugging Face
                                               directory)
    <run>/checkpoints/step-00000100/trainer/   state.pt: weights, optimizer, step, and of each rank
                                               random states, source position and hooks
    <run>/checkpoints/step-00000100/COMPLETE   written last: SHA-256 of state.pt, and of the metrics
                                               logged until then

A checkpoint is written under a temporary name, flushed to the disk and renamed, so a crash or a
full disk leaves the one before. One that was damaged later is named, and the one before it is
taken. The weights in `state.pt` have the precision they are trained in, whatever `save_model`
exports. Every rank reads the file, so several machines need a shared file system.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import random
import re
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llama2 import atomic, devices
from llama2.errors import UserError, explain_os_errors
from llama2.hashing import hash_content, hash_file
from llama2.ranks import Ranks
from llama2.runs import completion
from llama2.runs.sealed import seal, unseal
from llama2.train import parallel
from llama2.train.loop import TrainingState

SaveModel = Callable[[Path], None]
CHECKPOINTS, TRAINER, STATE, COMPLETE = "checkpoints", "trainer", "state.pt", "COMPLETE"
PARTIAL, DISCARDED = ".partial-", ".discarded-"
_NAME = re.compile(r"step-(\d{8,})")


def get_random_state(device: torch.device) -> dict[str, Any]:
    """Return the state of every global random generator of this process."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": random.getstate(),
        "torch": torch.get_rng_state(),
        "numpy": (
            str(kind),
            torch.from_numpy(np.array(keys, dtype=np.int64)),
            int(position),
            int(has_gauss),
            float(gauss),
        ),
    }
    return state | devices.get_random_state(device)


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Restore what `get_random_state` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    torch.set_rng_state(state["torch"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))

    devices.set_random_state(device, state)


def capture(training: TrainingState) -> dict[str, Any]:
    """Return everything a resumed run needs. All ranks call it; rank 0 gets the whole."""
    ranks = training.learner.ranks
    of_rank = {
        "source": training.source.state_dict(),
        "random": get_random_state(ranks.device),
        "hooks": [(type(hook).__name__, hook.state_dict()) for hook in training.hooks],
    }
    return {
        "learner": training.learner.state_dict(),
        "ranks": ranks.gather([of_rank]),
        "finish": training.finish,
    }


def restore(training: TrainingState, directory: Path) -> None:
    """Bring learner, source, hooks and random generators to where the checkpoint `directory` left
    them."""
    file, ranks = directory / TRAINER / STATE, training.learner.ranks
    sharded = parallel.is_sharded(training.learner.model)
    try:
        with explain_os_errors(file):
            # weights_only: a checkpoint is data and must not run code. A sharded model reads it
            # page by page.
            state = torch.load(file, map_location=devices.CPU, weights_only=True, mmap=sharded)
    except (RuntimeError, EOFError, KeyError, pickle.UnpicklingError) as error:
        raise _damaged(directory, (str(error).splitlines() or ["it is empty"])[0]) from error

    if len(state["ranks"]) != ranks.size:
        raise UserError(
            f"{directory}: taken by {len(state['ranks'])} ranks, this run has {ranks.size}",
            f"start it with {len(state['ranks'])} ranks",
        )

    of_rank = state["ranks"][ranks.rank]
    training.learner.load_state_dict(state["learner"])
    training.source.load_state_dict(of_rank["source"])
    kinds = [type(hook).__name__ for hook in training.hooks]
    kinds_before = [kind for kind, _ in of_rank["hooks"]]
    if kinds != kinds_before:
        raise ValueError(f"a run must resume with the hooks it had: {kinds_before}, not {kinds}")

    for hook, (_, saved) in zip(training.hooks, of_rank["hooks"]):
        hook.load_state_dict(saved)

    set_random_state(of_rank["random"], ranks.device)
    training.finish = state["finish"]
    training.checkpoint = directory


def list_checkpoints(run: Path) -> list[tuple[int, Path]]:
    """Return the complete checkpoints below a run directory with their steps, oldest first."""
    root = run / CHECKPOINTS
    if not root.is_dir():
        return []

    named = ((_NAME.fullmatch(path.name), path) for path in root.iterdir())
    return sorted(
        (int(match[1]), path) for match, path in named if match and (path / COMPLETE).is_file()
    )


def find_latest(run: Path) -> Path | None:
    """Return the newest complete checkpoint below a run directory; what a crash left unfinished
    does not count."""
    checkpoints = list_checkpoints(run)
    return checkpoints[-1][1] if checkpoints else None


def find_newest_whole(run: Path, ranks: Ranks) -> Path | None:
    """Return the newest complete checkpoint below a run directory whose content is what was
    written. All ranks call it.

    A damaged one is named and put aside: the run goes on from the one before. UserError where no
    other is left.
    """
    return ranks.first(lambda: _newest_whole(run))


def _newest_whole(run: Path) -> Path | None:
    damaged: list[tuple[Path, UserError]] = []
    for step, directory in reversed(list_checkpoints(run)):
        try:
            _check(directory)
        except UserError as error:
            damaged.append((directory, error))
            continue

        for path, fault in damaged:
            print(f"{fault.cause}; training goes on from step {step}", file=sys.stderr)
            path.rename(path.with_name(DISCARDED + path.name))

        return directory

    if damaged:
        raise damaged[0][1]

    return None


def _check(directory: Path) -> None:
    """UserError if a checkpoint is not what was written."""
    file, mark = directory / TRAINER / STATE, directory / COMPLETE
    if not file.is_file():
        raise _damaged(directory, "it is missing")

    # of an earlier version, without a checksum: the archive has one for each tensor
    if not mark.stat().st_size:
        try:
            with explain_os_errors(file), zipfile.ZipFile(file) as archive:
                wrong = archive.testzip()
        except (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError) as error:
            raise _damaged(directory, str(error)) from None

        if wrong:
            raise _damaged(directory, f"{wrong} differs from its checksum")
    elif unseal(mark, _cure(directory)).get(STATE) != hash_file(file):
        raise _damaged(directory, "its content differs from its checksum")


def _damaged(directory: Path, how: str) -> UserError:
    return UserError(
        f"{directory / TRAINER / STATE}: truncated or damaged ({how})", _cure(directory)
    )


def _cure(directory: Path) -> str:
    older = [
        step
        for step, path in list_checkpoints(directory.parent.parent)
        if path.name < directory.name
    ]
    return f"delete {directory}: the same command goes on " + (
        f"from the checkpoint of step {older[-1]}" if older else "from the beginning"
    )


def has_lost_metrics(run: Path, directory: Path) -> bool:
    """Tell whether lines of metrics that were there when a checkpoint was taken have changed."""
    if not (directory / COMPLETE).stat().st_size:
        return False

    size, digest = unseal(directory / COMPLETE, _cure(directory)).get(completion.METRICS) or (
        0,
        None,
    )
    return digest is not None and _describe_metrics(run, size) != [size, digest]


def _describe_metrics(run: Path, size: int = -1) -> list[Any] | None:
    """Return length and SHA-256 of the first `size` bytes of the metrics, or of all; None where
    there are none."""
    file = run / completion.METRICS
    if not file.is_file():
        return None

    with explain_os_errors(file), open(file, "rb") as opened:
        content = opened.read(size)

    return [len(content), hash_content(content)]


def save(
    training: TrainingState, run: Path, save_model: SaveModel | None = None, keep: int = 2
) -> Path:
    """Write the checkpoint of the current step and drop all but the newest `keep`. All ranks call
    it.

    `save_model(directory)` is called on every rank, because a sharded model must be gathered
    together; only rank 0 may write. A step that has its checkpoint already is left alone.
    """
    ranks = training.learner.ranks
    directory = run / CHECKPOINTS / f"step-{training.learner.step:08d}"
    if not ranks.broadcast((directory / COMPLETE).is_file()):
        partial = directory.with_name(PARTIAL + directory.name)
        state = capture(training)
        try:
            record = ranks.first(lambda: _write(partial, state, run))
            if save_model is not None:
                ranks.together(lambda: save_model(partial))

            ranks.first(lambda: _finish(partial, directory, record))
        except BaseException:
            if ranks.is_main:
                shutil.rmtree(partial, ignore_errors=True)

            raise

    if ranks.is_main:
        _prune(run, keep)

    training.checkpoint = directory
    return directory


def _write(partial: Path, state: dict[str, Any], run: Path) -> dict[str, Any]:
    """Write the state; return what its completion mark says: its SHA-256, and that of the metrics
    logged so far."""
    metrics = _describe_metrics(run)
    with explain_os_errors(partial):
        shutil.rmtree(partial, ignore_errors=True)
        atomic.make(partial / TRAINER)
        file = _HashedFile(io.FileIO(str(partial / TRAINER / STATE), "w"))
        try:
            with file:
                torch.save(state, file)
        except Exception as error:
            raise file.refusal or error from None

    return {completion.METRICS: metrics, STATE: file.digest.hexdigest()}


class _HashedFile(io.BufferedWriter):
    """A file that hashes what goes into it, and remembers why it could not be written: `torch.save`
    hides a full disk behind an error of its own."""

    refusal: OSError | None = None

    def __init__(self, raw: io.FileIO) -> None:
        super().__init__(raw)
        self.digest = hashlib.sha256()

    def write(self, content: Any) -> int:
        """Write and hash; keep the error of a refusal."""
        try:
            self.digest.update(content)
            return super().write(content)
        except OSError as error:
            self.refusal = error
            raise


def _finish(partial: Path, directory: Path, record: dict[str, Any]) -> None:
    run = directory.parent.parent
    with explain_os_errors(partial):
        (partial / COMPLETE).write_text(seal(record), encoding="utf-8")
        atomic.flush(run / completion.METRICS)
        atomic.flush_tree(partial)

        if directory.exists():  # without its completion mark: a broken leftover
            shutil.rmtree(directory)

        os.rename(partial, directory)
        atomic.flush(directory.parent)


def _prune(run: Path, keep: int) -> None:
    """Delete old checkpoints; each is renamed first, so that half of one is never taken for a
    whole."""
    for _, path in list_checkpoints(run)[:-keep]:
        path.rename(path.with_name(DISCARDED + path.name))

    for path in (run / CHECKPOINTS).iterdir():
        if path.name.startswith((PARTIAL, DISCARDED)):
            shutil.rmtree(path, ignore_errors=True)
