"""Damage between the steps of a recipe: is it named before it is used?

    python tests/fuzz/damage.py [--seed N] [--made DIR] [--steps NAME ...] [--share S]

A whole recipe is run once, with every verb in it. Then each file that each step left is emptied,
halved, edited, and given one flipped bit that neither its size nor its time tells of; one damage at
a time, undone afterwards. After each,

    again    the step itself is asked for again, as `llama2 run` does of finished steps;
    use      every step that names the file, or a folder around it, is made anew;
    report   a report about the recipe is made anew, if it opens the file at all.

Each must end with one line that names the file; anything else is SILENT. --seed repeats the damages
of an earlier call;
--made keeps the recipe's runs there, and takes them from there the next time; --share tries that
share of all damages. Exit status 1 if any damage is not named.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

ROOT = str(Path(__file__).parents[2])
sys.path[:0] = [str(Path(__file__).parents[1] / "journey"), ROOT]
import recipe as mini  # noqa: E402

from llama2 import cli  # noqa: E402
from llama2.config import build, list_paths  # noqa: E402
from llama2.recipe import launch  # noqa: E402
from llama2.runs import completion  # noqa: E402

NAMED, SILENT, OTHER = "named", "SILENT", "TRACEBACK OR OTHER ERROR"
Damage = Callable[[random.Random, bytes], bytes]


def edited(chance: random.Random, content: bytes) -> bytes:
    """A digit or letter in place of another, as by hand."""
    places = [match.start() for match in re.finditer(rb"[a-z0-9]", content)] or list(
        range(len(content))
    )
    where = chance.choice(places)
    return (
        content[:where]
        + bytes([ord("8") if content[where] != ord("8") else ord("3")])
        + content[where + 1 :]
    )


def flipped(chance: random.Random, content: bytes) -> bytes:
    found = bytearray(content)
    found[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    return bytes(found)


DAMAGES: dict[str, Damage] = {
    "emptied": lambda chance, content: b"",
    "halved": lambda chance, content: content[: len(content) // 2],
    "edited": edited,
    "flipped": flipped,
}


@contextlib.contextmanager
def damaged(file: Path, kind: str, chance: random.Random) -> Iterator[bool]:
    """The file damaged in place, or False where that would change nothing; as it was, times too, at
    the end."""
    content, status = file.read_bytes(), file.stat()
    changed = DAMAGES[kind](chance, content) if content else content
    try:
        if changed != content:
            file.write_bytes(changed)
            if kind == "flipped":
                os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))

        yield changed != content
    finally:
        file.write_bytes(content)
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def command(*words: object, opened: Path | None = None) -> tuple[int, str]:
    """The exit status and standard error of one command line, in a process of its own; what it
    opens goes to a file."""
    with tempfile.TemporaryFile() as said:
        child = os.fork()
        if child == 0:
            os.dup2(said.fileno(), 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            status = 1

            if opened is not None:
                _note_opened(opened)

            with contextlib.suppress(BaseException):
                status = cli._guarded([str(word) for word in words])

            sys.stderr.flush()
            os._exit(status)

        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        said.seek(0)
        return status, said.read().decode("utf-8", "replace")


def _note_opened(notes: Path) -> None:
    """Write down every file that this process opens from now on."""
    descriptor = os.open(notes, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

    def note(event: str, arguments: tuple[object, ...]) -> None:
        if event == "open":
            os.write(descriptor, f"{arguments[0]}\n".encode())

    sys.addaudithook(note)


def judged(status: int, said: str, file: Path) -> str:
    """Whether one line names the file (or, of a file with several names, another one)."""
    errors = [line for line in said.splitlines() if line.startswith("llama2: error: ")]
    twins = [other for other in file.parents[1].glob(f"*/{file.name}") if other.samefile(file)]
    named = len(errors) == 1 and any(str(path) in errors[0] for path in (file, *twins))

    if status == 2 and named and "Traceback" not in said:
        return NAMED

    return SILENT if status == 0 else OTHER


class Bench:
    """The finished recipe, and what is asked of it."""

    def __init__(self, folder: Path) -> None:
        self.file, self.out = folder / "recipe.yaml", folder / "run"
        if not (self.out / "report" / completion.COMPLETE).is_file():
            mini.write(self.file)
            subprocess.run(
                [sys.executable, "-m", "llama2.cli", "run", str(self.file), "--out", str(self.out)],
                check=True,
                env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": ROOT},
            )

        whole = subprocess.run(
            [sys.executable, "-m", "llama2.cli", "verify", str(self.out)],
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": ROOT},
        )
        if whole.returncode:  # by a call of this script that was ended
            raise SystemExit(
                f"these runs are damaged already, make them anew: {whole.stdout}{whole.stderr}"
            )

        self.steps = json.loads((self.out / "steps.json").read_text())
        self.inputs = {name: self._inputs(name) for name in self.steps}
        notes = folder / "opened"
        self.report(opened=notes)
        self.reported = {
            Path(line).resolve() for line in notes.read_text().splitlines() if line.startswith("/")
        }

    def _inputs(self, name: str) -> list[Path]:
        manifest = json.loads((self.out / name / completion.MANIFEST).read_text())
        config = build(launch.load(manifest["verb"]).Config, {**manifest["config"], "out": "x"})
        return [path.resolve() for _, path in list_paths(config)]

    def files(self, step: str) -> list[Path]:
        """Everything that a step left."""
        said = json.loads((self.out / step / completion.COMPLETE).read_text())
        return [
            self.out / step / name
            for name in (*said["outputs"], *said["records"], completion.COMPLETE)
        ]

    def users(self, file: Path) -> list[str]:
        """The steps that name a file, or a folder around it."""
        inside = {file.resolve(), *file.resolve().parents}
        return [name for name, read in self.inputs.items() if inside & set(read)]

    def again(self, step: str) -> tuple[int, str]:
        return command("run", self.file, "--out", self.out, "--step", step)

    def anew(self, step: str) -> tuple[int, str]:
        """The step made anew; what was there is put back."""
        here, aside = self.out / step, self.out.parent / "aside"
        here.rename(aside)
        try:
            return self.again(step)
        finally:
            shutil.rmtree(here, ignore_errors=True)
            aside.rename(here)

    def report(self, opened: Path | None = None) -> tuple[int, str]:
        out = self.out.parent / "page"
        shutil.rmtree(out, ignore_errors=True)
        return command("report", "--recipe", self.out, "--out", out, opened=opened)

    def outcomes(self, step: str, file: Path) -> Iterator[tuple[str, str, str]]:
        """What was asked, what came of it, and what was said."""
        status, said = self.again(step)
        yield "again", judged(status, said, file), said
        owners = self.users(file)

        # nobody reads them but the report
        if file.name in (completion.CONFIG, completion.METRICS, completion.WARNINGS):
            owners = []

        for user in owners:
            status, said = self.anew(user)
            yield "use", judged(status, said, file), said

        if file.resolve() in self.reported:
            status, said = self.report()
            yield "report", judged(status, said, file), said


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    parser.add_argument("--made", type=Path)
    parser.add_argument("--steps", nargs="*")
    parser.add_argument("--share", type=float, default=1.0)
    chosen = parser.parse_args()
    print(f"seed {chosen.seed}", flush=True)
    torch.set_num_threads(1)
    chance = random.Random(chosen.seed)

    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench((chosen.made or Path(scratch)).resolve())
        found: dict[tuple[str, str, str], Counter[str]] = {}
        wrong = []

        for step in chosen.steps or bench.steps:
            for file in bench.files(step):
                for kind in DAMAGES:
                    if chance.random() >= chosen.share:
                        continue

                    with damaged(file, kind, chance) as changed:
                        for asked, outcome, said in bench.outcomes(step, file) if changed else ():
                            found.setdefault((step, kind, asked), Counter())[outcome] += 1
                            if outcome != NAMED:
                                wrong.append(
                                    f"{outcome}: {file.relative_to(bench.out)} {kind}, {asked}: "
                                    f"{' / '.join(said.splitlines()[-2:])[:300]}"
                                )

            print(f"{step}: {_line(found, step)}", flush=True)

    print(f"\n{'':10}{'again':>24}{'use':>24}{'report':>24}")
    for kind in DAMAGES:
        print(
            f"{kind:10}"
            + "".join(
                f"{_line(found, None, kind, asked):>24}" for asked in ("again", "use", "report")
            )
        )

    for line in wrong:
        print(line)

    total = sum(count for counts in found.values() for count in counts.values())
    print(f"{total} cases, {len(wrong)} not named before they were used (seed {chosen.seed})")
    return 1 if wrong or not total else 0


def _line(
    found: dict[tuple[str, str, str], Counter[str]],
    step: str | None,
    kind: str = "",
    asked: str = "",
) -> str:
    counts: Counter[str] = Counter()
    for key, outcomes in found.items():
        if step in (None, key[0]) and kind in ("", key[1]) and asked in ("", key[2]):
            counts += outcomes

    return ", ".join(f"{number} {outcome}" for outcome, number in counts.most_common()) or "-"


if __name__ == "__main__":
    sys.exit(main())
