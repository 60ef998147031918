"""Cases of runs that do not end as they should: damaged checkpoints, disks that lose power, killed
processes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checks import Work, is_refusal
from reliability import one_line

if TYPE_CHECKING:
    from run import Bench


def cases() -> Iterator[tuple[str, str, Work]]:
    """Name, what is expected, and the work."""
    yield from _checkpoints()
    yield from _durable()
    yield from _processes()


RECIPE = """
cores: 1
steps:
  world: {verb: world, scale: 0.01}
  clean: {verb: clean, heldout: 0, sources: {a: {path: "${world}/documents/encyclopedia.jsonl"}}}
  again: {verb: clean, heldout: 0, sources: {a: {path: "${clean}/documents/a.jsonl"}}}
"""


def short_recipe(bench: Bench) -> Path:
    file = bench.scratch / "short.yaml"
    file.write_text(RECIPE)
    return file


# --- checkpoints in progress ---
def _dialogs(bench: Bench) -> Path:
    file = bench.scratch / "taught.jsonl"
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"how is tea {n}"},
                {"role": "assistant", "content": "good"},
            ]
        }
        for n in range(60)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    return file


def _training(bench: Bench, out: Path, steps: int = 60) -> list[str]:
    return [
        "sft",
        "--model",
        str(bench.model),
        "--dialogs.a.path",
        str(_dialogs(bench)),
        "--sequence-length",
        "64",
        "--batch-size",
        "4",
        "--epochs",
        "50",
        "--heldout",
        "0",
        "--training.plan.max-steps",
        str(steps),
        "--training.plan.save-every",
        "5",
        "--out",
        str(out),
    ]


def _begun(bench: Bench) -> tuple[Path, bytes]:
    """A run that was killed between two checkpoints and the end, and the weights that it should
    come to."""
    place, whole = bench.scratch / "begun", bench.scratch / "begun-whole"
    if not place.exists():
        assert bench.process(*_training(bench, whole)).status == 0
        watched = subprocess.Popen(
            [sys.executable, "-m", "llama2.cli", *_training(bench, place)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=_environment(),
        )
        end = time.monotonic() + 120

        while time.monotonic() < end and len(list(place.glob("checkpoints/step-*/COMPLETE"))) < 2:
            time.sleep(0.002)

        watched.kill()
        watched.wait()
        assert not (place / "COMPLETE").exists(), "it was done before it was killed"

    copy = bench.scratch / "begun-copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(place, copy)

    return copy, (whole / "model.safetensors").read_bytes()


def _cleaned(bench: Bench) -> Path:
    """A finished run of `clean`, with documents held out, which is what `tokenize` reads."""
    world, place = bench.scratch / "cleaned-world", bench.scratch / "cleaned"
    for words in (
        ("world", "--scale", "0.01", "--out", str(world)),
        (
            "clean",
            "--sources.s.path",
            str(world / "documents/encyclopedia.jsonl"),
            "--heldout",
            "0.3",
            "--out",
            str(place),
        ),
    ):
        got = bench.llama2(*words)
        assert got.status == 0, got.said

    return place


def _environment() -> dict[str, str]:
    from run import surroundings

    return surroundings({})


def _checkpoints() -> Iterator[tuple[str, str, Work]]:
    def resumed(file: str, change: Callable[[Path], None], pattern: str) -> Work:
        """The run comes to the weights of one never stopped, or one line names the file and what to
        do."""

        def work(bench: Bench) -> tuple[bool, str]:
            place, expected = _begun(bench)
            for path in sorted(place.glob(file))[-1:]:
                change(path)

            got = bench.process(*_training(bench, place))
            if got.status == 0:
                return (
                    place / "model.safetensors"
                ).read_bytes() == expected, f"{got.short()} | resumed"

            return one_line(got, pattern)

        return work

    def flip(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[len(content) * 3 // 10] ^= 64
        path.write_bytes(content)

    state = "checkpoints/step-*/trainer/state.pt"
    delete = r"state\.pt.*delete"
    yield "checkpoint: untouched", "the same weights", resumed("none", lambda path: None, "never")
    yield (
        "checkpoint: a flipped bit",
        "named, or the one before is taken",
        resumed(state, flip, delete),
    )
    yield (
        "checkpoint: empty",
        "named with what to delete",
        resumed(state, lambda path: path.write_bytes(b"") and None, delete),
    )
    yield (
        "checkpoint: half",
        "named with what to delete",
        resumed(state, lambda path: os.truncate(path, path.stat().st_size // 2), delete),
    )
    yield (
        "checkpoint: missing",
        "named with what to delete",
        resumed(state, lambda path: path.unlink(), delete),
    )
    yield (
        "metrics.jsonl cut",
        "the same weights",
        resumed(
            "metrics.jsonl",
            lambda path: os.truncate(path, path.stat().st_size - 7),
            r"metrics\.jsonl",
        ),
    )
    yield (
        "manifest.json half",
        "named",
        resumed(
            "manifest.json",
            lambda path: os.truncate(path, path.stat().st_size // 2),
            r"manifest\.json",
        ),
    )

    def seconds(content: bytes) -> Work:
        def work(bench: Bench) -> tuple[bool, str]:
            place, expected = _begun(bench)
            (place / ".seconds").write_bytes(content)
            got = bench.process(*_training(bench, place))

            return (
                (got.status == 0 and (place / "model.safetensors").read_bytes() == expected)
                or is_refusal(got, r"\.seconds")
            ), got.short()

        return work

    for content in (b"", b"x", b"1.5\0", b"-1", b"nan", b"\xff"):
        yield f".seconds {content!r}", "the same weights, or one line", seconds(content)

    def indexed(bench: Bench) -> tuple[bool, str]:
        """Token shards whose index a loss of power cut: an unfinished run starts them over."""
        out = bench.scratch / "tokens"
        shutil.rmtree(out, ignore_errors=True)
        words = (
            "tokenize",
            "--documents",
            str(_cleaned(bench)),
            "--tokenizer",
            str(bench.model),
            "--out",
            str(out),
        )
        first = bench.llama2(*words)

        if first.status:
            return False, first.short()

        before = {
            path: path.read_bytes()
            for path in out.rglob("*")
            if path.suffix in (".bin", ".json") and path.parent != out
        }
        (out / "COMPLETE").unlink()
        for index in out.rglob("index.json"):
            os.truncate(index, index.stat().st_size // 2)

        got = bench.process(*words)
        return got.status == 0 and {
            path: path.read_bytes() for path in before
        } == before, got.short()

    yield "tokenize: a cut index in an unfinished run", "made again", indexed


# --- power ---
def _durable() -> Iterator[tuple[str, str, Work]]:
    def synced(*words: str) -> Work:
        """Every output and its directory is on the disk before COMPLETE has its name."""

        def work(bench: Bench) -> tuple[bool, str]:
            prompts = bench.scratch / "synced.jsonl"
            rows = [
                {"id": f"p{n}", "messages": [{"role": "user", "content": "why"}]} for n in range(4)
            ]
            prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
            texts = bench.scratch / "synced.txt"
            texts.write_text(
                "\n\n".join(f"the cat sat on a mat {n} and the sun and moon" for n in range(50))
            )
            names = {
                "MODEL": bench.model,
                "HELPFUL": bench.helpful,
                "SAFE": bench.safe,
                "PROMPTS": prompts,
                "TEXTS": texts,
                "DIALOGS": _dialogs(bench),
                "CLEANED": _cleaned(bench),
            }
            any_name = r"\b(" + "|".join(names) + r")\b"
            said = [re.sub(any_name, lambda match: str(names[match[1]]), word) for word in words]

            return _watched(bench, said)

        return work

    few = ("--sample.max-tokens", "4", "--out", "OUT")
    for verb, words in {
        "world": ("world", "--scale", "0.01", "--out", "OUT"),
        "clean": ("clean", "--sources.s.path", "TEXTS", "--heldout", "0.1", "--out", "OUT"),
        "prepare": ("prepare", "--kind", "dialogs", "--sources.s.path", "DIALOGS", "--out", "OUT"),
        "tokenizer": ("tokenizer", "--documents", "TEXTS", "--vocab-size", "290", "--out", "OUT"),
        "tokenize": ("tokenize", "--documents", "CLEANED", "--tokenizer", "MODEL", "--out", "OUT"),
        "sft": (
            "sft",
            "--model",
            "MODEL",
            "--dialogs.a.path",
            "DIALOGS",
            "--sequence-length",
            "64",
            "--training.plan.max-steps",
            "2",
            "--out",
            "OUT",
        ),
        "rejection": (
            "rejection",
            "--policy",
            "MODEL",
            "--rewards.helpful",
            "HELPFUL",
            "--prompts",
            "PROMPTS",
            "--k",
            "2",
            "--temperatures",
            "1.0",
            *few,
        ),
        "collect": (
            "collect",
            "--policies",
            "MODEL",
            "--prompts",
            "PROMPTS",
            "--heldout",
            "0.5",
            *few,
        ),
        "select": (
            "select",
            "--candidate",
            "MODEL",
            "--predecessor",
            "MODEL",
            "--rewards.helpful",
            "HELPFUL",
            "--rewards.safe",
            "SAFE",
            "--prompts",
            "PROMPTS",
            *few,
        ),
        "import": ("import", "MODEL", "--out", "OUT"),
    }.items():
        yield f"power: {verb}", "all outputs are on the disk before COMPLETE", synced(*words)


def _watched(bench: Bench, words: list[str]) -> tuple[bool, str]:
    done: set[tuple[int, int]] = set()
    before: set[tuple[int, int]] | None = None
    fsync, replace, rename = os.fsync, os.replace, os.rename

    def note(descriptor: int) -> None:
        status = os.fstat(descriptor)
        done.add((status.st_dev, status.st_ino))
        fsync(descriptor)

    def moved(move: Callable[..., None]) -> Callable[..., None]:
        def call(source: Any, target: Any, **more: Any) -> None:
            nonlocal before
            if Path(os.fspath(target)).name == "COMPLETE":
                before = set(done)

            move(source, target, **more)

        return call

    os.fsync, os.replace, os.rename = note, moved(replace), moved(rename)
    try:
        got = bench.llama2(*words)
    finally:
        os.fsync, os.replace, os.rename = fsync, replace, rename

    if got.status:
        return False, got.short()

    sure = before if (got.out / "COMPLETE").exists() else done
    left = [
        path.relative_to(got.out).as_posix() or "."
        for path in (got.out, *sorted(got.out.rglob("*")))
        if path.name not in (".lock", "COMPLETE")
        and "checkpoints" not in path.parts
        and (path.stat().st_dev, path.stat().st_ino) not in (sure or set())
    ]
    return not left, f"{got.short()[:60]} | not on the disk: {left[:6]} ({len(left)})"


# --- processes that die ---
def _children(parent: int) -> list[int]:
    found = []
    for place in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = place.read_text().rpartition(")")[2].split()
        except OSError:
            continue

        if int(fields[1]) == parent:
            found += [int(place.parent.name), *_children(int(place.parent.name))]

    return found


def _processes() -> Iterator[tuple[str, str, Work]]:
    def started(
        bench: Bench, words: list[str], log: Path, **environment: str
    ) -> subprocess.Popen[bytes]:
        with open(log, "wb") as file:
            return subprocess.Popen(
                [sys.executable, "-m", "llama2.cli", *words],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env={**_environment(), **environment},
            )

    def ended(process: subprocess.Popen[bytes], log: Path, seconds: float = 90) -> tuple[int, str]:
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return 124, "it hangs"

        return process.returncode, log.read_text("utf-8", "replace")

    def forkserver(bench: Bench) -> tuple[bool, str]:
        log, out = bench.scratch / "fork.log", bench.scratch / "forked"
        process = started(bench, ["run", str(short_recipe(bench)), "--out", str(out)], log)
        end = time.monotonic() + 90

        while (
            time.monotonic() < end
            and not (out / "world" / ".lock").exists()
            and process.poll() is None
        ):
            time.sleep(0.01)

        servers = [
            child
            for child in _children(process.pid)
            if b"forkserver" in Path(f"/proc/{child}/cmdline").read_bytes()
        ]
        for child in servers[:1]:
            os.kill(child, signal.SIGKILL)

        status, said = ended(process, log)
        return (
            bool(servers) and status not in (0, 124) and "Traceback" not in said
        ), f"exit {status}, {len(servers)} killed: {said.strip()[-200:]}"

    yield "the server of workers killed", "one line that says a process was killed", forkserver

    def rank(bench: Bench) -> tuple[bool, str]:
        out, log = bench.scratch / "ranks", [bench.scratch / f"rank{n}.log" for n in range(2)]
        shutil.rmtree(out, ignore_errors=True)
        words = _training(bench, out, steps=700)
        port = str(20000 + os.getpid() % 20000)
        ranks = [
            started(
                bench,
                words,
                log[n],
                RANK=str(n),
                LOCAL_RANK=str(n),
                WORLD_SIZE="2",
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=port,
            )
            for n in range(2)
        ]
        end = time.monotonic() + 120

        while (
            time.monotonic() < end
            and not list(out.glob("checkpoints/step-*/COMPLETE"))
            and all(one.poll() is None for one in ranks)
        ):
            time.sleep(0.01)

        ranks[1].kill()
        ranks[1].wait()
        status, said = ended(ranks[0], log[0])
        last = said.strip().splitlines()[-1:] or [""]

        return (
            status not in (0, 124) and "Traceback" not in said and "rank" in last[0]
        ), f"exit {status}: {last[0][:200]}"

    yield "a rank killed", "the other says which, and that it resumes", rank

    def interrupted(bench: Bench) -> tuple[bool, str]:
        log, out = bench.scratch / "int.log", bench.scratch / "interrupted"
        process = started(bench, ["run", str(short_recipe(bench)), "--out", str(out)], log)
        end = time.monotonic() + 90

        while (
            time.monotonic() < end
            and not (out / "world" / ".lock").exists()
            and process.poll() is None
        ):
            time.sleep(0.01)

        process.send_signal(signal.SIGINT)
        status, said = ended(process, log)
        return status == 130 and "Traceback" not in said, f"exit {status}: {said.strip()[-160:]}"

    yield "Ctrl-C in a recipe", "exit 130", interrupted
