"""`kill -9` of a whole recipe, again and again, sometimes with a failure of power: is the end the
same, to the bit?

    python tests/fuzz/kill.py [--kills 60] [--cuts 20] [--seed N] [--longest 25] [--made DIR]

A recipe with every verb is run once without a stop. Then it is run elsewhere, and its whole process
group, or now and then its first process alone, is killed at a random moment; the same command goes
on, and is killed again, until it gets to its end. Then the next story begins, until there were
--kills kills.

After --cuts of them the power fails as well: every file that was not flushed to the disk since it
was last written is cut to nothing or to half. Which these are is known because the processes write
down each fsync: a `sitecustomize` that this script puts on their path wraps `os.fsync`, and is
nowhere but there.

At the end of a story every output of every step is compared with the run that was never stopped.
Processes that still live half a minute after a kill are orphans. Exit status 1 for a difference, an
orphan, a traceback, or a run that is stuck.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1] / "journey"), str(Path(__file__).parents[2])]
import recipe as mini  # noqa: E402

NOTES = "FUZZ_FLUSHED"
SITE = """
import os
_fsync, _notes = os.fsync, os.environ.get("FUZZ_FLUSHED")
def fsync(descriptor):
    _fsync(descriptor)
    state = os.fstat(descriptor)
    note = os.open(_notes, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(note, f"{state.st_ino} {state.st_size} {state.st_mtime_ns}\\n".encode())
    os.close(note)
if _notes:
    os.fsync = fsync
"""
PATIENCE = 30.0
"""seconds after which a process that still lives is an orphan; on an idle machine the last is gone
after five"""
TIMED = {"report"}  # it tells how long everything took


@dataclass
class Tale:
    """What happened."""

    kills: int = 0
    cuts: int = 0
    files_cut: int = 0
    lived: float = 0.0
    """seconds that the last process lived after a kill, at most"""
    stories: int = 0
    faults: list[str] = field(default_factory=list)


def family(session: int) -> set[int]:
    """The living processes of a session."""
    found = set()
    for entry in Path("/proc").iterdir():
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) == session and fields[0] not in "ZX":
                found.add(int(entry.name))
        except (OSError, ValueError, IndexError):
            continue

    return found


def end(session: int, tale: Tale) -> None:
    """Wait until nobody of a session is left; who stays is an orphan, and is ended."""
    begin = time.monotonic()
    while (left := family(session)) and time.monotonic() < begin + PATIENCE:
        time.sleep(0.05)

    tale.lived = max(tale.lived, time.monotonic() - begin)
    for process in left:
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{process}/cmdline").read_text().replace("\0", " ")
            tale.faults.append(f"a process outlives a kill: {words[:100]}")
            os.kill(process, signal.SIGKILL)


def unflushed(out: Path, notes: Path) -> list[Path]:
    """The files with something in them that was not flushed since they were written."""
    flushed = set(notes.read_text().splitlines()) if notes.exists() else set()
    found = []
    for folder, _, names in os.walk(out):
        for path in (
            Path(folder, name) for name in names if name != ".lock" and not name.endswith(".log")
        ):
            with contextlib.suppress(OSError):  # it has just got its name
                state = path.lstat()
                if (
                    state.st_size
                    and f"{state.st_ino} {state.st_size} {state.st_mtime_ns}" not in flushed
                ):
                    found.append(path)

    return sorted(found)


def fail_power(out: Path, notes: Path, chance: random.Random) -> int:
    """Cut every file that was not flushed; how many they were."""
    files = unflushed(out, notes)
    for path in files:
        os.truncate(path, chance.choice([0, path.stat().st_size // 2]))

    return len(files)


def results(out: Path) -> dict[str, dict[str, str]]:
    """Of every step the hash of each of its outputs."""
    steps = json.loads((out / "steps.json").read_text())
    return {
        name: json.loads((out / name / "COMPLETE").read_text())["outputs"]
        for name in steps
        if name not in TIMED
    }


class Bench:
    def __init__(self, folder: Path, longest: float, chance: random.Random) -> None:
        self.folder, self.longest, self.chance = folder, longest, chance
        self.file, self.notes, self.log = folder / "recipe.yaml", folder / "flushed", folder / "log"
        (folder / "site").mkdir(parents=True, exist_ok=True)
        (folder / "site/sitecustomize.py").write_text(SITE)
        mini.write(self.file)
        path = os.pathsep.join(
            [str(folder / "site"), str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
        )
        self.environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": path,
            NOTES: str(self.notes),
        }

    def start(self, out: Path) -> subprocess.Popen[bytes]:
        with open(self.log, "wb") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "llama2.cli", "run", str(self.file), "--out", str(out)],
                stdout=log,
                stderr=log,
                env=self.environment,
                start_new_session=True,
            )

    def whole(self) -> dict[str, dict[str, str]]:
        """The outputs of the recipe that nobody stops."""
        out = self.folder / "whole"
        if self.start(out).wait():
            raise SystemExit(f"the recipe fails: {self.log.read_text()}")

        return results(out)

    def attempt(self, out: Path, tale: Tale, cut: bool) -> bool:
        """One attempt, killed after a while; True if it came to its end before."""
        process = self.start(out)
        try:
            process.wait(self.chance.uniform(0.2, self.longest))
        except subprocess.TimeoutExpired:
            while cut and process.poll() is None and not unflushed(out, self.notes):
                time.sleep(0.001)  # the power fails when there is something to lose

        if process.poll() is None:
            if self.chance.random() < 0.25:
                process.kill()
            else:
                os.killpg(process.pid, signal.SIGKILL)

            process.wait()
            end(process.pid, tale)
            tale.kills += 1

            if cut:
                tale.cuts, tale.files_cut = (
                    tale.cuts + 1,
                    tale.files_cut + fail_power(out, self.notes, self.chance),
                )

            return False

        if status := process.wait():
            said = self.log.read_text("utf-8", "replace").strip().splitlines()
            tale.faults.append(
                f"story {tale.stories + 1} is stuck with exit status {status}: {' / '.join(said[-2:])}"
            )

        end(process.pid, tale)
        return True

    def story(self, tale: Tale, kills: int, cuts: int, expected: dict[str, dict[str, str]]) -> None:
        """Attempts until the recipe is done."""
        out = self.folder / "story"
        shutil.rmtree(out, ignore_errors=True)
        self.notes.unlink(missing_ok=True)
        before = len(tale.faults)

        while True:
            if tale.kills >= kills:
                self.longest = 1e6  # the last story goes to its end

            left = kills - tale.kills
            cut = left > 0 and self.chance.random() < (cuts - tale.cuts) / left
            if self.attempt(out, tale, cut):
                break

        tale.stories += 1
        logs = "".join(path.read_text("utf-8", "replace") for path in out.glob("logs/*.log"))
        if "Traceback" in logs or "Traceback" in self.log.read_text("utf-8", "replace"):
            tale.faults.append(f"story {tale.stories}: a traceback")

        if len(tale.faults) == before:
            found = results(out)
            tale.faults += [
                f"story {tale.stories}: {step}/{name} differs"
                for step, made in expected.items()
                for name in sorted({*made, *found[step]})
                if made.get(name) != found[step].get(name)
            ]
            tale.faults += [
                f"story {tale.stories}: {path.relative_to(out)} is left over"
                for path in out.rglob("*")
                if path.name.endswith((".tmp", ".partial", ".discarded"))
                or path.name == "checkpoints"
            ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--cuts", type=int, default=20)
    parser.add_argument("--longest", type=float, default=25.0, help="seconds until a kill, at most")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    parser.add_argument("--made", type=Path, help="work here, and leave all there")
    chosen = parser.parse_args()
    print(f"seed {chosen.seed}", flush=True)
    tale = Tale()

    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(
            (chosen.made or Path(scratch)).resolve(), chosen.longest, random.Random(chosen.seed)
        )
        expected = bench.whole()
        while tale.kills < chosen.kills:
            bench.story(tale, chosen.kills, chosen.cuts, expected)
            print(
                f"story {tale.stories}: {tale.kills} kills, {tale.cuts} of them with {tale.files_cut} files cut, "
                f"{len(tale.faults)} faults",
                *tale.faults,
                sep="\n",
                flush=True,
            )

    print(
        f"{tale.kills} kills, {tale.cuts} with {tale.files_cut} unflushed files cut, {tale.stories} recipes "
        f"finished, {len(tale.faults)} faults; the last process lived {tale.lived:.1f} s (seed {chosen.seed})"
    )
    return 1 if tale.faults else 0


if __name__ == "__main__":
    sys.exit(main())
