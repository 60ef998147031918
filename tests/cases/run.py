"""Strangers' inputs against the product: every case prints what is expected and what was got.

    python tests/cases/run.py FOLDER [NAME ...]

FOLDER holds the inputs, in the folders `data`, `recipe`, `formats` and `reliability`; without NAMEs
all cases run. A name is that of a case or of a module of cases, and one that ends with * is the
beginning of names. A case is a command line of `llama2`, carried out in this process or, where it
may hang or crash, in one of its own with a time limit, or requests to a real server; and what must
come of it. Exit status 1 if a case differs, 2 if there is no such case. The inputs are not part of
this repository: the tests beside each module hold small ones of the same kinds.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import clients
import configuration
import data
import formats
import interrupted
import machines
import recipe
import reliability
import torch
import training
import wire
from service import Service

from llama2 import cli, ranks
from llama2.formats import checkpoint
from llama2.model.llama import Llama, LlamaConfig
from llama2.model.scorer import Scorer
from llama2.tokenizer import train as train_tokenizer

ROOT = Path(__file__).resolve().parents[2]
MODULES = (
    data,
    training,
    configuration,
    recipe,
    formats,
    clients,
    wire,
    reliability,
    machines,
    interrupted,
)
WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "why",
    "how",
    "what",
    "is",
    "tea",
    "sun",
    "moon",
    "and",
    "leaves",
    "yes",
    "no",
    "hello",
    "good",
    "answer",
    "question",
]


@dataclass
class Got:
    """What a command came to."""

    status: int
    out: Path
    said: str
    crashed: bool

    def records(self, name: str) -> list[dict[str, object]]:
        """The records of a file the run wrote, [] where there is none."""
        file = self.out / name
        return (
            [json.loads(line) for line in file.read_text("utf-8").split("\n") if line]
            if file.is_file()
            else []
        )

    def json(self, name: str) -> dict[str, object]:
        """A JSON file the run wrote, {} where there is none."""
        file = self.out / name
        return dict(json.loads(file.read_text("utf-8"))) if file.is_file() else {}

    def short(self) -> str:
        """The status, and the last line on stderr."""
        lines = [line for line in self.said.strip().split("\n") if line.strip()]
        return f"exit {self.status}: {lines[-1][:230] if lines else ''}"


Check = Callable[[Got], tuple[bool, str]]


class Bench:
    """The folder of inputs, a scratch folder, and a tiny model to train."""

    def __init__(self, inputs: Path, scratch: Path) -> None:
        self.inputs, self.scratch, self.count = inputs, scratch, 0
        self.services: dict[str, Service] = {}
        self.model, self.helpful, self.safe = (
            scratch / name for name in ("model", "helpful", "safe")
        )
        torch.set_num_threads(1)  # processes are forked from this one
        torch.manual_seed(0)
        texts = [
            " ".join(WORDS[(i * 7 + j * 3) % len(WORDS)] for j in range(30)) for i in range(200)
        ]
        tokenizer = train_tokenizer(texts, 320, self.model)
        shape = LlamaConfig(tokenizer.vocab_size, 32, 64, 2, 2, 2, max_position_embeddings=256)
        checkpoint.save(Llama(shape, 1), self.model)

        for seed, place in enumerate((self.helpful, self.safe), 2):
            checkpoint.save(Scorer(shape, seed), place)
            tokenizer.save(place)

    def file(self, name: str) -> str:
        """An input, as an absolute path."""
        return str(self.inputs / name)

    def rejection(self, prompts: Path | str, *more: str, judge: Path | None = None) -> Got:
        """Two short answers to each prompt, the better one kept; of a flag given twice, `more`
        counts."""
        return self.llama2(
            "rejection",
            "--policy",
            str(self.model),
            "--rewards.helpful",
            str(judge or self.helpful),
            "--prompts",
            str(prompts),
            "--k",
            "2",
            "--temperatures",
            "1.0",
            "--sample.max-tokens",
            "8",
            "--out",
            "OUT",
            *more,
        )

    def llama2(self, *arguments: str) -> Got:
        """Carry out one command line; `OUT` stands for a run directory of its own."""
        self.count += 1
        out = self.scratch / f"out{self.count}"
        said, printed = io.StringIO(), io.StringIO()
        crashed, status = False, 1

        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(printed):
            try:
                status = int(
                    cli.main([argument.replace("OUT", str(out)) for argument in arguments]) or 0
                )
            except SystemExit as ended:
                status = int(ended.code or 0)
            except BaseException:
                crashed = True
                traceback.print_exc()
            finally:
                ranks.leave()

        return Got(status, out, printed.getvalue() + said.getvalue(), crashed)

    def process(
        self,
        *arguments: str,
        seconds: float = 120,
        said: str = "",
        before: Callable[[], None] | None = None,
        **environment: str | None,
    ) -> Got:
        """Carry out one command line in a process of its own; crashed if it hangs, dies of a signal
        or has a traceback.

        `said` is its standard input; `environment` changes variables (None takes one away);
        `before` is called in the process before it begins.
        """
        self.count += 1
        out = self.scratch / f"out{self.count}"
        words = [word.replace("OUT", str(out)) for word in arguments]

        if environment or before is not None:
            return self._fresh(words, out, seconds, said, before, environment)

        return self._forked(words, out, seconds, said)

    def _fresh(
        self,
        words: list[str],
        out: Path,
        seconds: float,
        said: str,
        before: Callable[[], None] | None,
        environment: Mapping[str, str | None],
    ) -> Got:
        """In a process that begins anew: a start takes seconds."""
        try:
            ended = subprocess.run(
                [sys.executable, "-m", "llama2.cli", *words],
                timeout=seconds,
                preexec_fn=before,
                input=said.encode("utf-8", "surrogatepass"),
                capture_output=True,
                env=surroundings(environment),
                cwd=self.scratch,
            )
        except subprocess.TimeoutExpired:
            return Got(124, out, f"hang: no end after {seconds:g} seconds", True)

        printed = (ended.stdout + ended.stderr).decode("utf-8", "replace")
        return Got(
            ended.returncode,
            out,
            printed,
            ended.returncode < 0 or "Traceback (most recent" in printed,
        )

    def _forked(self, words: list[str], out: Path, seconds: float, said: str) -> Got:
        """In a process forked from this one, which has everything imported."""
        printed = self.scratch / f"printed{self.count}"
        (self.scratch / "said").write_text(said, "utf-8")
        sys.stdout.flush()
        child = os.fork()

        if not child:
            _carry_out(words, self.scratch / "said", printed)

        end, status = time.monotonic() + seconds, None
        while status is None and time.monotonic() < end:
            ended, found = os.waitpid(child, os.WNOHANG)
            status = os.waitstatus_to_exitcode(found) if ended else None
            time.sleep(0.005)

        if status is None:
            os.kill(child, 9)
            os.waitpid(child, 0)
            return Got(124, out, f"hang: no end after {seconds:g} seconds", True)

        text = printed.read_text("utf-8", "replace")
        return Got(status, out, text, status < 0 or "Traceback (most recent" in text)

    def served(self, *paths: Path | str, **flags: str) -> Service:
        """A server of these models, one and the same for every case that asks for it alike."""
        key = json.dumps([[str(path) for path in paths], flags], sort_keys=True)
        if key not in self.services:
            self.services[key] = Service(
                self.scratch / f"server{len(self.services)}.log", paths, flags, surroundings({})
            )

        return self.services[key]

    def close(self) -> None:
        """End all servers."""
        for service in self.services.values():
            service.stop()


def _carry_out(words: list[str], said: Path, printed: Path) -> None:
    """Run one command line in this forked process, and end it."""
    status = 1
    for number, name, kind in (
        (0, said, os.O_RDONLY),
        (1, printed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
    ):
        os.dup2(os.open(name, kind), number)

    os.dup2(1, 2)
    sys.stdin, sys.stdout, sys.stderr = (
        open(number, mode, encoding="utf-8", errors=errors)  # noqa: SIM115
        for number, mode, errors in (
            (0, "r", "surrogateescape"),
            (1, "w", "strict"),
            (2, "w", "backslashreplace"),
        )
    )
    try:
        cli.main(words)
        status = 0
    except SystemExit as ended:
        status = int(ended.code or 0)
    except BaseException:
        traceback.print_exc()

    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def surroundings(changes: Mapping[str, str | None]) -> dict[str, str]:
    """The environment of a process that runs this tree's code, with changes."""
    found = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **changes}
    return {name: value for name, value in found.items() if value is not None}


@dataclass(frozen=True)
class Case:
    """`work` carries the case out; `expected` says in words what must come of it; `script` is where
    it stands."""

    module: str
    name: str
    expected: str
    work: Callable[[Bench], tuple[bool, str]]


def cases() -> Iterator[Case]:
    """Every case, those of data first."""
    for module in MODULES:
        for name, expected, work in module.cases():
            yield Case(module.__name__, name, expected, work)


def is_named(case: Case, asked: str) -> bool:
    """Whether a case is meant by a name: its own, its module's, or the beginning of either."""
    names = (case.module, case.name)
    return (
        any(name.startswith(asked[:-1]) for name in names)
        if asked.endswith("*")
        else asked in names
    )


def main(arguments: list[str]) -> int:
    """Run the cases named, print a line for what is expected and one for what was got."""
    if not arguments or not Path(arguments[0]).is_dir():
        print(__doc__, file=sys.stderr)
        return 2

    names = arguments[1:]
    every = list(cases())
    if unknown := [name for name in names if not any(is_named(case, name) for case in every)]:
        print(f"no case is called {', '.join(unknown)}", file=sys.stderr)
        return 2

    chosen = [case for case in every if not names or any(is_named(case, name) for name in names)]
    scratch = Path(tempfile.mkdtemp())
    wrong = []
    bench = Bench(Path(arguments[0]).resolve(), scratch)

    try:
        for case in chosen:
            try:
                right, got = case.work(bench)
            except Exception as error:  # a case that fails is one that differs
                right, got = False, f"{type(error).__name__}: {error}"

            wrong += [] if right else [case.name]
            got = re.sub(re.escape(str(scratch)), "...", got).replace(str(bench.inputs), "...")
            print(
                f"{'ok  ' if right else 'DIFF'} {case.name}\n       expected  {case.expected}\n       got       {got}",
                flush=True,
            )
    finally:
        bench.close()
        shutil.rmtree(scratch, ignore_errors=True)

    print(
        f"{len(chosen) - len(wrong)} of {len(chosen)} as expected"
        + (f"; differ: {', '.join(wrong)}" if wrong else "")
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
