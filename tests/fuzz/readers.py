"""Damaged files against every reader of models, records and runs, each in a process of its own.

    python tests/fuzz/readers.py [--count 2000] [--seed S] [--only GROUP ...] [--number N]
    [--originals FOLDER]

A mutation damages one file of a copy of what a group needs; the command that reads it then runs in
a process forked from one that has everything imported. It must end with status 0, or with status 2
and one clean line. Faults: a traceback, a hang, a process killed, a line of more than 2,000
characters, control characters on a terminal, an exit status of its own, and a wrong acceptance
(`groups.py` says what that is). The seed is new each time and is printed; a fault is kept with the
line that repeats it. Exit status 1 if there is one. `--originals` keeps the undamaged files, which
take a minute or two to make, for the next time.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import re
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent.parent), str(HERE.parent), str(HERE)]
os.environ["OMP_NUM_THREADS"] = "1"

import torch  # noqa: E402
from groups import CRC, SUMS, Group, Insane, groups  # noqa: E402
from originals import build  # noqa: E402

from llama2 import cli  # noqa: E402
from llama2.errors import UserError  # noqa: E402
from llama2.recipe import launch  # noqa: E402
from llama2.recipe.verbs import VERBS  # noqa: E402

MEMORY = 8 << 30
LONGEST = 2000
_PLACE = re.compile(r'File "[^"]*?/(llama2/[^"]+)", line (\d+)')
_UNSEEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


@dataclass
class Outcome:
    """What came of one mutation. `fault` is "" if nothing is wrong; `detail` tells faults of one
    cause apart."""

    group: Group
    number: int
    folder: Path
    kind: str
    fault: str = ""
    detail: str = ""


# --- in the process of a mutation ---
def carry_out(group: Group, folder: Path, everything: Path) -> None:
    """Run the command here, look at what it made, leave status and facts in `folder`; does not
    return."""
    limit = _virtual() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    for number, name in ((0, os.devnull), (1, folder / "stdout"), (2, folder / "stderr")):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), number)

    os.chdir(folder)  # a path may have become a relative one
    result: dict[str, Any] = {"status": 1}
    try:
        result["status"] = _status(_words(group, folder, everything))
        if result["status"] == 0:
            out = folder / ("in" if "OUT" not in group.words else "out")
            result["facts"] = _facts(group, out)
    except (Insane, UserError) as error:
        result["insane"] = str(error)
    except BaseException:
        traceback.print_exc()

    sys.stdout.flush()
    sys.stderr.flush()
    (folder / "result").write_text(json.dumps(result))
    os._exit(0)


def _status(words: list[str]) -> int:
    try:
        return cli._guarded(words)
    except SystemExit as ended:
        return int(ended.code or 0)


def _facts(group: Group, out: Path) -> dict[str, Any]:
    facts = group.look(out)
    if facts.get("finite") is False:
        sys.stdin = open(os.devnull)  # noqa: SIM115
        if (status := _status(["chat", str(out), "--max-tokens", "2"])) != 2:
            raise Insane(f"the logits are not finite, and chat ends with {status}")

    return facts


def _words(group: Group, folder: Path, everything: Path) -> list[str]:
    places = {"IN": folder / "in", "OUT": folder / "out", "ALL": everything}
    words = [*group.words]
    if words[0] == "WORDS":  # what is damaged is the command itself
        words[:1] = json.loads((folder / "in" / "words.json").read_text())["words"]

    return [
        re.sub(r"\b(IN|OUT|ALL)\b", lambda match: str(places[match[1]]), word) for word in words
    ]


def _virtual() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


# --- outside ---
class Fuzzer:
    """Damages, starts, waits and judges."""

    def __init__(self, everything: Path, scratch: Path, seed: int, seconds: float) -> None:
        self.everything, self.scratch, self.seed, self.seconds = everything, scratch, seed, seconds
        self.whole: dict[str, Any] = {}

    def prepare(self, group: Group, number: int | None) -> Path | None:
        """A folder with the damaged copy; None if the damage changed nothing. Without a number
        nothing is damaged."""
        folder = (
            self.scratch
            / f"{re.sub('[^A-Za-z0-9_.]+', '-', group.name)}-{'whole' if number is None else number}"
        )
        shutil.copytree(self.everything / group.original, folder / "in")
        if number is None:
            return folder

        chance = random.Random(f"{self.seed}/{group.name}/{number}")
        found = sorted(
            path
            for path in (folder / "in").glob(group.file)
            if path.is_file() and path.name != ".lock"
        )
        if not found:
            raise SystemExit(
                f"{group.name}: no {group.file} below {self.everything / group.original}"
            )

        file = chance.choice([path for path in found if path.stat().st_size] or found)
        before = file.read_bytes()
        for _ in range(20):
            mutation = chance.choice(group.mutations)
            after = mutation(chance, before) if before else b"x"
            if after != before:
                break
        else:
            shutil.rmtree(folder)
            return None

        file.write_bytes(after)
        (folder / "damage").write_text(
            f"{mutation.__name__} of {file.relative_to(folder / 'in')}\n"
        )
        return folder

    def start(self, group: Group, folder: Path) -> int:
        child = os.fork()
        if not child:
            carry_out(group, folder, self.everything)

        return child

    def is_late(self, child: int, waited: float) -> bool:
        """Whether a process has had its time of a core, or has waited for it as long as on no
        machine."""
        if waited <= self.seconds:
            return False

        fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
        worked = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        return worked > self.seconds or waited > 20 * self.seconds

    def judge(self, group: Group, number: int | None, folder: Path, status: int | None) -> Outcome:
        """What a process that has ended came to; `status` is None if it had to be killed."""
        file = folder / "result"
        said = (
            (folder / "stderr").read_text("utf-8", "replace")
            if (folder / "stderr").exists()
            else ""
        )
        result = json.loads(file.read_text()) if file.exists() else {}
        ended = result.get("status")
        outcome = Outcome(
            group,
            -1 if number is None else number,
            folder,
            {0: "accepted", 2: "refused"}.get(ended, f"status {ended}"),
        )

        if status is None:
            outcome.fault = "hang"
        elif not result:
            outcome.fault, outcome.detail = "killed", f"wait status {status}"
        elif "Traceback (most recent" in said or "Exception ignored" in said:
            places = _PLACE.findall(said)
            last = next(
                (
                    line
                    for line in reversed(said.strip().splitlines())
                    if line and line[0] not in " ~^"
                ),
                "",
            )
            outcome.fault = "traceback"
            outcome.detail = f"{':'.join(places[-1]) if places else '?'} {last.partition(':')[0]}"
        else:
            outcome.fault, outcome.detail = self._fault(group, result, said, number)

        if number is None:
            self.whole[group.name] = result.get("facts")

        return outcome

    def _fault(
        self, group: Group, result: dict[str, Any], said: str, number: int | None
    ) -> tuple[str, str]:
        lines = said.splitlines()
        errors = [line for line in lines if line.startswith("llama2: error: ")]
        if found := _UNSEEN.search(said.replace("\x1b[K", "").replace("\r", "")):
            return "control characters", f"{found[0]!r}"
        if any(len(line) > LONGEST for line in lines):
            return "endless line", f"{max(map(len, lines))} characters: {max(lines, key=len)[:80]}"
        if "insane" in result:
            return "wrongly accepted", str(result["insane"])[:160]
        if result["status"] == 2 and (
            len(errors) != 1 or not lines[-1].startswith("llama2: error: ")
        ):
            return "not one line", said[-160:]
        if result["status"] not in (0, 2):
            return "status", f"{result['status']}: {said[-160:]}"

        if result["status"] == 0 and number is not None:
            if group.oracle == SUMS:
                return "wrongly accepted", "a recorded hash covers the file"
            if group.oracle == CRC and result["facts"] != self.whole[group.name]:
                return "wrongly accepted", "a checksum covers it, and something else came out"

        return "", ""


def run_all(fuzzer: Fuzzer, tasks: list[tuple[Group, int | None]], jobs: int) -> Iterator[Outcome]:
    """Carry tasks out, `jobs` at a time, each in its own process; an outcome for each as it
    ends."""
    waiting, running = list(reversed(tasks)), {}
    while waiting or running:
        while waiting and len(running) < jobs:
            group, number = waiting.pop()
            if (folder := fuzzer.prepare(group, number)) is not None:
                running[fuzzer.start(group, folder)] = (group, number, folder, time.monotonic())

        time.sleep(0.002)
        for child, (group, number, folder, begin) in list(running.items()):
            ended, status = os.waitpid(child, os.WNOHANG)
            late = not ended and fuzzer.is_late(child, time.monotonic() - begin)
            if late:
                os.kill(child, 9)
                os.waitpid(child, 0)

            if ended or late:
                del running[child]
                yield fuzzer.judge(group, number, folder, None if late else status)


def shared_out(
    chosen: list[Group], count: int, number: int | None
) -> list[tuple[Group, int | None]]:
    """Which mutations of which groups make `count`, by the weight of each group."""
    if number is not None:
        return [(group, number) for group in chosen]

    total = sum(group.weight for group in chosen)
    tasks: list[tuple[Group, int | None]] = []
    owed = 0.0

    for group in chosen:
        owed += count * group.weight / total
        for index in range(round(owed)):
            tasks.append((group, index))

        owed -= round(owed)

    return tasks


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument(
        "--only", nargs="+", default=[], help="groups, or beginnings of their names"
    )
    parser.add_argument(
        "--number", type=int, default=None, help="this mutation of each group alone"
    )
    parser.add_argument("--originals", type=Path, default=None)
    parser.add_argument("--faults", type=Path, default=None, help="where damaged files are kept")
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--build", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()

    if asked.build:
        build(asked.build)
        return 0

    seed = random.SystemRandom().randrange(1 << 32) if asked.seed is None else asked.seed
    chosen = [
        group
        for group in groups()
        if not asked.only
        or any(group.name == name or group.name.startswith(name) for name in asked.only)
    ]
    scratch = Path(tempfile.mkdtemp(prefix="fuzz-"))
    everything = (asked.originals or scratch / "originals").resolve()
    kept = asked.faults or Path(tempfile.gettempdir()) / f"fuzz-faults-{seed}"
    print(f"seed {seed}; {len(chosen)} groups", flush=True)

    try:
        subprocess.run(
            [sys.executable, str(HERE / "readers.py"), "--build", str(everything)], check=True
        )
        return report(
            fuzz(Fuzzer(everything, scratch, seed, asked.seconds), chosen, asked), kept, seed
        )
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def fuzz(fuzzer: Fuzzer, chosen: list[Group], asked: argparse.Namespace) -> Iterator[Outcome]:
    """The undamaged files first: all must be accepted. Then the mutations."""
    torch.set_num_threads(1)
    for verb in VERBS:
        if verb != "serve":
            launch.load(verb)

    for module in (
        "matplotlib.figure",
        "matplotlib.ticker",
        "matplotlib.backends.backend_svg",
        "pyarrow.parquet",
    ):
        importlib.import_module(module)  # what commands import when they need it, each process anew

    whole: list[tuple[Group, int | None]] = [(group, None) for group in chosen]
    readable = []
    for outcome in run_all(fuzzer, whole, asked.jobs):
        if outcome.kind == "accepted" and not outcome.fault:
            readable.append(outcome.group.name)
        else:
            outcome.fault = outcome.fault or "the undamaged file is refused"
            outcome.detail = (
                outcome.detail or (outcome.folder / "stderr").read_text().strip()[-200:]
            )

        yield outcome

    yield from run_all(
        fuzzer,
        shared_out([one for one in chosen if one.name in readable], asked.count, asked.number),
        asked.jobs,
    )


def report(outcomes: Iterator[Outcome], kept: Path, seed: int) -> int:
    """Print every cause of faults once with the line that repeats it, then the counts."""
    counts: Counter[str] = Counter()
    causes: Counter[tuple[str, str]] = Counter()
    for outcome in outcomes:
        counts[outcome.fault or outcome.kind] += 1
        if outcome.fault:
            group = outcome.group.name
            at_line = outcome.fault == "traceback"
            cause = (
                outcome.fault,
                outcome.detail if at_line else f"{group}: {re.sub('[0-9]+', 'N', outcome.detail)}",
            )
            causes[cause] += 1

            if causes[cause] == 1:
                kept.mkdir(parents=True, exist_ok=True)
                shutil.copytree(outcome.folder, kept / outcome.folder.name, dirs_exist_ok=True)
                note = outcome.folder / "damage"
                damage = note.read_text().strip() if note.exists() else "nothing is damaged"
                again = f"--seed {seed} --only {shlex.quote(group)} --number {outcome.number}"
                print(
                    f"{outcome.fault}: {group}: {outcome.detail}\n"
                    f"    {damage}; python tests/fuzz/readers.py {again}\n"
                    f"    kept: {kept / outcome.folder.name}",
                    flush=True,
                )

        shutil.rmtree(outcome.folder, ignore_errors=True)
        if counts.total() % 200 == 0:
            print(f"{counts.total()} done, {causes.total()} faults", flush=True)

    total = sum(counts.values())
    print(
        "\n"
        + "\n".join(f"{count:6} {name}" for name, count in counts.most_common())
        + f"\n{total:6} mutations"
    )
    if causes:
        print(
            "\ncauses of faults:\n"
            + "\n".join(
                f"{count:6} {fault}: {detail}" for (fault, detail), count in causes.most_common()
            )
        )

    return 1 if causes else 0


if __name__ == "__main__":
    sys.exit(main())
