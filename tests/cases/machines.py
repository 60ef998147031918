"""Cases of machines that are not ours: caches, users, locales, clocks, pipes."""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checks import Work
from interrupted import short_recipe

if TYPE_CHECKING:
    from run import Bench, Got

STRANGER, VICTIM, NOBODY = 65534, 12345, 54321


def cases() -> Iterator[tuple[str, str, Work]]:
    """Name, what is expected, and the work."""
    yield from _libraries()
    yield from _places()
    yield from _pipes()


def talk(bench: Bench, model: Path | None = None, **more: Any) -> Got:
    return bench.process(
        "chat",
        str(model or bench.model),
        "--max-tokens",
        "2",
        "--temperature",
        "0",
        said="how is tea\n",
        **more,
    )


def fine(got: Got, *never: str) -> tuple[bool, str]:
    """It worked, and said nothing of these."""
    return got.status == 0 and not got.crashed and not any(
        one in got.said for one in never
    ), got.short()


def as_user(number: int) -> Callable[[], None]:
    """Become another user, who may read everything (the interpreter may lie in a closed home) and
    owns nothing."""
    system = ctypes.CDLL(None, use_errno=True)
    keep, ambient, rise, read_all = 8, 47, 2, 2

    def become() -> None:
        os.setgroups([])
        os.setgid(number)
        system.prctl(keep, 1, 0, 0, 0)
        os.setuid(number)
        head = struct.pack("Ii", 0x20080522, 0)
        system.capset(head, struct.pack("6I", *(1 << read_all,) * 3, 0, 0, 0))
        system.prctl(ambient, rise, read_all, 0, 0)

    return become


def open_to_all(bench: Bench) -> Path:
    """A copy of the model, and a folder for files, that every user may read."""
    bench.scratch.chmod(0o755)
    place = bench.scratch / "shared"
    if not place.exists():
        shutil.copytree(bench.model, place)
        for file in (place, *place.rglob("*")):
            file.chmod(0o755 if file.is_dir() else 0o644)

    return place


# --- native libraries ---
def _libraries() -> Iterator[tuple[str, str, Work]]:
    for how in (
        "a folder of another's",
        "a link to a folder of another's",
        "a library of another's in ours",
    ):
        yield f"library planted: {how}", "another user's code does not run", _planted(how)

    damages: dict[str, Callable[[bytes], bytes]] = {
        "cut at 5,000 bytes": lambda content: content[:5000],
        "emptied": lambda content: b"",
        "halved": lambda content: content[: len(content) // 2],
        "no library": lambda content: b"#!/bin/sh\n",
        "zeros in the middle": lambda content: content[:6000] + b"\0" * 4000 + content[10000:],
    }
    for name, damage in damages.items():
        yield f"library {name}", "built again", _damaged(damage)

    def no_compiler(bench: Bench) -> tuple[bool, str]:
        empty = bench.scratch / "bin"
        empty.mkdir(exist_ok=True)
        got = talk(bench, PATH=str(empty), CXX=None, XDG_CACHE_HOME=str(bench.scratch / "no-cache"))
        count = got.said.count("no C++ compiler")

        return fine(got)[0] and count == 1, f"{got.short()} | said {count} times"

    yield "no compiler", "it works, and says so once", no_compiler

    def failing(bench: Bench) -> tuple[bool, str]:
        fake = bench.scratch / "failing"
        fake.mkdir(exist_ok=True)
        (fake / "g++").write_text("#!/bin/sh\necho broken >&2; exit 1\n")
        (fake / "g++").chmod(0o755)

        return fine(
            talk(
                bench,
                PATH=f"{fake}:{os.environ['PATH']}",
                XDG_CACHE_HOME=str(bench.scratch / "no-cache2"),
            )
        )

    yield "a compiler that fails", "it works", failing


def _built(bench: Bench, name: str) -> tuple[Path, list[Path]]:
    """A cache with the libraries in it."""
    cache = bench.scratch / name
    shutil.rmtree(cache, ignore_errors=True)
    got = talk(bench, XDG_CACHE_HOME=str(cache))
    assert got.status == 0, got.said

    return cache, sorted(cache.rglob("*.so"))


def _planted(how: str) -> Work:
    def work(bench: Bench) -> tuple[bool, str]:
        if os.getuid():
            return True, "left out: only root can be two users"

        model = open_to_all(bench)
        _, found = _built(bench, "names")
        if not found:
            return False, "no library is built here"

        temporary = bench.scratch / "tmp" / re.sub(r"\W+", "-", how)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        (bench.scratch / "tmp").chmod(0o755)
        temporary.chmod(0o1777)
        mark = temporary / "mark"
        source = temporary / "evil.c"
        source.write_text(
            "#include <stdio.h>\n__attribute__((constructor)) static void run(void) "
            f'{{ FILE *file = fopen("{mark}", "w"); if (file) fclose(file); }}\n'
        )
        library = temporary / "evil.so"
        subprocess.run(["gcc", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
        guessed = temporary / f"llama2-{VICTIM}"
        folder = temporary / "elsewhere" if how.startswith("a link") else guessed
        folder.mkdir()

        for each in found:
            shutil.copyfile(library, folder / each.name)
            (folder / each.name).chmod(0o755)

        owner = VICTIM if how.startswith("a library") else STRANGER
        for path, user in ((folder, owner), *((file, STRANGER) for file in folder.iterdir())):
            os.chown(path, user, user)

        if folder != guessed:
            guessed.symlink_to(folder)
            os.chown(guessed, STRANGER, STRANGER, follow_symlinks=False)

        got = talk(
            bench,
            model,
            before=as_user(VICTIM),
            HOME="/nonexistent",
            XDG_CACHE_HOME=None,
            TMPDIR=str(temporary),
        )
        return (
            fine(got)[0] and not mark.exists(),
            f"{got.short()} | {'it ran' if mark.exists() else 'it did not run'}",
        )

    return work


def _damaged(damage: Callable[[bytes], bytes]) -> Work:
    def work(bench: Bench) -> tuple[bool, str]:
        cache, found = _built(bench, "damaged")
        if not found:
            return False, "no library is built here"

        whole = {file.name: file.stat().st_size for file in found}
        for file in found:
            content = damage(file.read_bytes())
            file.unlink()
            file.write_bytes(content)
            file.chmod(0o700)

        got = talk(bench, XDG_CACHE_HOME=str(cache))
        again = talk(bench, XDG_CACHE_HOME=str(cache))
        sizes = {file.name: file.stat().st_size for file in cache.rglob("*.so")}
        mended = any(sizes.get(name) == size for name, size in whole.items())

        return fine(got)[0] and fine(again)[
            0
        ] and mended, f"{got.short()} | sizes {whole} -> {sizes}"

    return work


# --- homes, caches, locales ---
def _places() -> Iterator[tuple[str, str, Work]]:
    def homeless(bench: Bench) -> tuple[bool, str]:
        if os.getuid():
            return True, "left out: only root can be another user"

        return fine(
            talk(bench, open_to_all(bench), before=as_user(NOBODY), HOME=None, XDG_CACHE_HOME=None)
        )

    yield "no HOME, a user without an entry", "chat works", homeless
    yield "no HOME", "chat works", lambda bench: fine(talk(bench, HOME=None, XDG_CACHE_HOME=None))

    def odd_cache(make: Callable[[Path], None]) -> Work:
        """Libraries are kept elsewhere; nobody is told that they do not build."""

        def work(bench: Bench) -> tuple[bool, str]:
            cache, temporary = bench.scratch / "odd-cache", bench.scratch / "odd-tmp"
            for path in (cache, temporary):
                if path.is_symlink() or path.is_file():
                    path.unlink()

                shutil.rmtree(path, ignore_errors=True)

            temporary.mkdir()
            make(cache)
            got = talk(bench, XDG_CACHE_HOME=str(cache), TMPDIR=str(temporary))

            return fine(got, "does not build")[0], got.short()

        return work

    for name, make in {
        "a file in its place": lambda path: path.write_text("x") and None,
        "a link to nowhere": lambda path: path.symlink_to("/proc/none/x"),
        "below a device": lambda path: path.symlink_to("/dev/full"),
    }.items():
        yield f"cache: {name}", "libraries are kept elsewhere", odd_cache(make)

    def read_only(bench: Bench) -> tuple[bool, str]:
        if os.getuid():
            return True, "left out: only root can be another user"

        model, cache, temporary = open_to_all(bench), bench.scratch / "ro", bench.scratch / "ro-tmp"
        cache.mkdir(exist_ok=True)
        cache.chmod(0o555)
        temporary.mkdir(exist_ok=True)
        temporary.chmod(0o1777)
        got = talk(
            bench,
            model,
            before=as_user(NOBODY),
            XDG_CACHE_HOME=str(cache),
            TMPDIR=str(temporary),
            HOME="/",
        )
        kept = sorted(file.name for file in temporary.rglob("*.so"))

        return fine(got, "does not build")[0] and bool(kept), f"{got.short()} | {kept}"

    yield "cache: read-only", "libraries are kept elsewhere", read_only

    ascii_ = {"LC_ALL": "C", "LANG": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}

    def in_ascii(*words: str) -> Work:
        def work(bench: Bench) -> tuple[bool, str]:
            file = bench.scratch / "caf\u00e9.jsonl"
            file.write_text(
                json.dumps({"prompt": "Wo ist der M\u00fcller?"}, ensure_ascii=False) + "\n",
                "utf-8",
            )
            cache = bench.scratch / "ascii"
            shutil.rmtree(cache, ignore_errors=True)
            words_ = [
                word.replace("FILE", str(file)).replace("MODEL", str(bench.model)) for word in words
            ]

            return fine(
                bench.process(*words_, said="caf\u00e9\n", **ascii_, XDG_CACHE_HOME=str(cache))
            )

        return work

    yield "ASCII locale: chat", "works", in_ascii("chat", "MODEL", "--max-tokens", "4")
    yield (
        "ASCII locale: prepare",
        "works",
        in_ascii("prepare", "--kind", "prompts", "--sources.s.path", "FILE", "--out", "OUT"),
    )
    yield "ASCII locale: import", "works", in_ascii("import", "MODEL", "--out", "OUT")
    yield "ASCII locale: a whole run", "works", _ascii_run(ascii_)

    def backwards(bench: Bench) -> tuple[bool, str]:
        """A clock that runs a hundred times as fast, and backwards."""
        real, begin = time.time, time.time()
        time.time = lambda: begin - 100 * (real() - begin)
        try:
            got = bench.llama2("world", "--scale", "0.01", "--out", "OUT")
        finally:
            time.time = real

        seconds = got.json("COMPLETE").get("seconds")
        return got.status == 0 and isinstance(
            seconds, int | float
        ) and seconds >= 0, f"{got.short()} | {seconds}"

    yield "a clock set back", "no negative time", backwards

    def absolute(bench: Bench) -> tuple[bool, str]:
        prompts = bench.scratch / "asked.jsonl"
        rows = [{"id": f"p{n}", "messages": [{"role": "user", "content": "why"}]} for n in range(4)]
        prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
        got = bench.llama2(
            "evaluate",
            "--versions.a",
            str(bench.model),
            "--versions.b",
            str(bench.model),
            "--rewards.helpful",
            str(bench.helpful),
            "--rewards.safe",
            str(bench.safe),
            "--prompts",
            str(prompts),
            "--max-tokens",
            "4",
            "--out",
            "OUT",
        )
        text = (got.out / "evaluation.json").read_text() if got.status == 0 else ""

        return got.status == 0 and str(bench.scratch) not in text, got.short()

    yield "evaluation.json", "names no place of this machine", absolute


def _ascii_run(environment: dict[str, str]) -> Work:
    return lambda bench: fine(
        bench.process("run", str(short_recipe(bench)), "--out", "OUT", **environment)
    )


# --- chat on a pipe ---
def _pipes() -> Iterator[tuple[str, str, Work]]:
    lines = "".join(f"how is tea {number}\n" for number in range(60))

    def many(bench: Bench) -> tuple[bool, str]:
        got = bench.process(
            "chat",
            str(bench.model),
            "--max-tokens",
            "4",
            "--temperature",
            "0",
            "--each-line",
            said=lines,
        )
        return fine(got, "llama2: error")[0], got.short()

    yield "chat: 60 lines on a pipe, each alone", "all are answered", many

    def grown(bench: Bench) -> tuple[bool, str]:
        got = bench.process(
            "chat", str(bench.model), "--max-tokens", "4", "--temperature", "0", said=lines
        )
        errors = got.said.count("llama2: error: ")
        return (
            got.status == 2 and errors == 1 and "--each-line" in got.said,
            f"{got.short()} | {errors} errors",
        )

    yield (
        "chat: 60 lines on a pipe",
        "what outgrows the context ends in one line that names a cure",
        grown,
    )

    def commands(bench: Bench) -> tuple[bool, str]:
        file = bench.scratch / "saved.jsonl"
        got = bench.process(
            "chat", str(bench.model), "--max-tokens", "4", said=f"how\n/save {file}\n/quit\nwhy\n"
        )
        return (
            not file.exists() and not got.crashed,
            f"{got.short()} | {'obeyed' if file.exists() else 'not obeyed'}",
        )

    yield "chat: a command in piped data", "is data", commands
