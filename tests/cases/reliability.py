"""Cases of files that lie: damaged records, containers, configurations, models, and names that are
paths."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from checks import Work, is_refusal, ok
from safetensors.torch import load_file, save_file
from weights import whole

if TYPE_CHECKING:
    from run import Bench, Got

ESCAPES = "\x1b]0;title\x07\x1b[2J"
UNSEEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
LONGEST = 2000


def cases() -> Iterator[tuple[str, str, Work]]:
    """Name, what is expected, and the work."""
    yield from _records()
    yield from _deep()
    yield from _models()
    yield from _shown()
    yield from _names()
    yield from _runs()


def one_line(got: Got, pattern: str) -> tuple[bool, str]:
    """Refused in one line that can be shown in a terminal and read by a person."""
    errors = [line for line in got.said.splitlines() if line.startswith("llama2: error: ")]
    right = (
        is_refusal(got, pattern)
        and len(errors) == 1
        and len(errors[0]) <= LONGEST
        and not UNSEEN.search(got.said)
    )
    longest = max(map(len, got.said.splitlines()), default=0)

    return right, got.short() + ("" if right else f" ({longest} characters at most)")


def refused(pattern: str, *arguments: str, **more: Any) -> Work:
    """The command line, in a process of its own, is refused in one line."""

    def work(bench: Bench) -> tuple[bool, str]:
        words = [
            word.replace("MODEL", str(bench.model)).replace(
                "HERE", str(bench.inputs / "reliability")
            )
            for word in arguments
        ]
        return one_line(bench.process(*words, **more), pattern)

    return work


# --- records and their containers ---
def _records() -> Iterator[tuple[str, str, Work]]:
    def prepare(kind: str, file: str, *more: str) -> Callable[[Bench], Got]:
        return lambda bench: bench.llama2(
            "prepare",
            "--kind",
            kind,
            "--sources.s.path",
            bench.file(f"reliability/{file}"),
            "--out",
            "OUT",
            *more,
        )

    skip = ("--sources.s.malformed", "skip")
    for kind, file in (
        ("dialogs", "sur.jsonl"),
        ("dialogs", "nul.jsonl"),
        ("prompts", "sur.jsonl"),
    ):
        if kind == "dialogs":
            yield (
                f"{kind}: {file}",
                "half a pair is named with its line",
                lambda b, kind=kind, file=file: one_line(
                    prepare(kind, file)(b), rf"{file}:1.*surrogate"
                ),
            )
            yield (
                f"{kind}: {file}, skipped",
                "and can be left out: nothing is left",
                (
                    lambda b, kind=kind, file=file: one_line(
                        prepare(kind, file, *skip)(b), "no |left|empty|malformed"
                    )
                ),
            )

    def documents(*more: str) -> Callable[[Bench], Got]:
        return lambda bench: bench.llama2(
            "clean",
            "--sources.s.path",
            bench.file("reliability/surdoc.jsonl"),
            "--heldout",
            "0",
            "--out",
            "OUT",
            *more,
        )

    yield (
        "documents: surdoc.jsonl",
        "half a pair is named with its line",
        lambda b: one_line(documents()(b), r"surdoc\.jsonl:1.*surrogate"),
    )
    yield (
        "prompts: x.csv",
        "read",
        lambda b: ok(
            prepare("prompts", "x.csv")(b), lambda got: len(got.records("prompts.jsonl")) == 1
        ),
    )
    for file in ("flip.parquet", "flip2.parquet", "hdr.zip", "m99.zip"):
        for kind in ("dialogs", "prompts"):
            yield (
                f"{kind}: {file}",
                "one line that names the file",
                lambda b, kind=kind, file=file: one_line(prepare(kind, file)(b), re.escape(file)),
            )

    for file in ("bz.zip", "lz.zip", "slip.zip"):
        yield (
            f"dialogs: {file}",
            "read, or one line that names the file",
            lambda b, file=file: (
                (True, "read")
                if (got := prepare("dialogs", file)(b)).status == 0
                else one_line(got, re.escape(file))
            ),
        )

    def harmless_slip(bench: Bench) -> tuple[bool, str]:
        got = prepare("dialogs", "slip.zip")(bench)
        found = list(bench.scratch.rglob("evil.json")) + list(Path("/").glob("evil.json"))
        return not found, f"{got.short()} | {found}"

    yield "slip.zip writes nothing", "no file outside", harmless_slip

    def encrypted(bench: Bench) -> tuple[bool, str]:
        """The bit that says so, set in both heads."""
        import io
        import zipfile

        written = io.BytesIO()

        with zipfile.ZipFile(written, "w") as archive:
            archive.writestr("a.jsonl", '{"prompt": "a"}\n')

        content = bytearray(written.getvalue())
        content[6] |= 1
        content[content.index(b"PK\1\2") + 8] |= 1
        file = bench.scratch / "locked.zip"
        file.write_bytes(content)

        return one_line(
            bench.llama2(
                "prepare", "--kind", "prompts", "--sources.s.path", str(file), "--out", "OUT"
            ),
            "locked.zip",
        )

    yield "prompts: an encrypted zip", "one line that names the file", encrypted


# --- nesting ---
def _deep() -> Iterator[tuple[str, str, Work]]:
    deep = "[" * 100_000 + "]" * 100_000

    def rows(kind: str, ending: str) -> Work:
        def work(bench: Bench) -> tuple[bool, str]:
            file = bench.scratch / f"deep{ending}"
            file.write_text('{"prompt": "a", "x": ' + deep + "}\n" if ending == ".jsonl" else deep)
            return one_line(
                bench.process(
                    "prepare", "--kind", kind, "--sources.s.path", str(file), "--out", "OUT"
                ),
                f"deep{ending}",
            )

        return work

    for kind in ("prompts", "dialogs", "preferences"):
        for ending in (".jsonl", ".json"):
            yield f"deep{ending} as {kind}", "one line that names the file", rows(kind, ending)

    def meta(content: str, pattern: str) -> Work:
        def work(bench: Bench) -> tuple[bool, str]:
            place = bench.scratch / "meta"
            if not place.exists():
                bench.llama2("export", str(bench.model), "--to", "meta", "--out", str(place))

            values = json.loads((place / "params.json").read_text())
            copy = bench.scratch / "meta-odd"
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(place, copy)
            changed = content.replace("VALUES", json.dumps(values)[1:-1])
            (copy / "params.json").write_text(changed)

            return one_line(bench.process("import", str(copy), "--out", "OUT"), pattern)

        return work

    yield "params.json: deep", "one line", meta(deep, "params.json")
    yield (
        "params.json: n_heads of 1,000 items",
        "one line that can be read",
        meta("{VALUES, " + f'"n_heads": {[1] * 1000}' + "}", "n_heads"),
    )
    yield (
        "recipe: deep.yaml",
        "one line",
        refused(r"deep\.yaml", "run", "HERE/deep.yaml", "--out", "OUT", "--dry-run"),
    )
    yield (
        "recipe: bomb.yaml",
        "one line, at once",
        refused(r"bomb\.yaml", "run", "HERE/bomb.yaml", "--out", "OUT", "--dry-run", seconds=60),
    )
    yield (
        "configuration: bomb.yaml",
        "one line, at once",
        refused("bomb|x|known", "sft", "HERE/bomb.yaml", "--out", "OUT", "--dry-run", seconds=60),
    )
    yield (
        "flag: a deep value",
        "one line",
        refused(
            "model|dialogs|deep|nest",
            "sft",
            "--model",
            "MODEL",
            "--dialogs",
            "[" * 30_000 + "]" * 30_000,
            "--out",
            "OUT",
        ),
    )

    def report(bench: Bench) -> tuple[bool, str]:
        place = _reported(bench)
        (place / "steps.json").write_text(deep)
        return one_line(
            bench.process("report", "--recipe", str(place), "--out", "OUT"), r"steps\.json"
        )

    yield "steps.json: deep", "one line", report


# --- models ---
def _copy(bench: Bench, name: str) -> Path:
    place = bench.scratch / "odd" / name
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(bench.model, place)

    return place


def _models() -> Iterator[tuple[str, str, Work]]:
    def sick(bench: Bench) -> Path:
        """A model with one undefined number, which says so nowhere."""
        place = _copy(bench, "nan")
        (place / "checksums.json").unlink(missing_ok=True)
        found = load_file(place / "model.safetensors")
        found["model.norm.weight"][0] = float("nan")
        save_file(found, place / "model.safetensors", {"format": "pt"})

        return place

    few = ("--sample.max-tokens", "4", "--out", "OUT")
    finite = "finite|undefined|infinite|nan"
    for verb, words in {
        "chat": ("chat", "SICK", "--max-tokens", "2"),
        "import": ("import", "SICK", "--out", "OUT"),
        "ghost": ("ghost", "--policy", "SICK", "--conversations", "PROMPTS", *few),
        "collect": ("collect", "--policies", "SICK", "--prompts", "PROMPTS", *few),
        "rejection": (
            "rejection",
            "--policy",
            "SICK",
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
    }.items():

        def work(bench: Bench, words: tuple[str, ...] = words) -> tuple[bool, str]:
            prompts = bench.scratch / "few.jsonl"
            asked = [
                {
                    "id": f"p{n}",
                    "messages": [{"role": "user", "content": "why"}],
                    "metadata": {"questions": ["why", "how"], "instruction": {"text": "say tea"}},
                }
                for n in range(4)
            ]
            prompts.write_text("".join(json.dumps(one) + "\n" for one in asked))

            for name, place in (
                ("SICK", sick(bench)),
                ("PROMPTS", prompts),
                ("HELPFUL", bench.helpful),
            ):
                words = tuple(word.replace(name, str(place)) for word in words)

            return one_line(bench.process(*words, said="hi\n"), finite)

        yield f"NaN weights: {verb}", "refused: the numbers are not finite", work

    def served(bench: Bench) -> tuple[bool, str]:
        service = bench.served(sick(bench))
        return bool(
            re.search(finite, service.refusal, re.IGNORECASE)
        ), service.refusal or "it serves"

    yield "NaN weights: serve", "refused before the port opens", served

    def talked(key: str, value: float) -> Work:
        """A directory of such a configuration is not talked to, imported or not."""

        def work(bench: Bench) -> tuple[bool, str]:
            place = whole(bench, bench.model, "odd-config", {key: value})
            (place / "checksums.json").unlink(missing_ok=True)
            return one_line(
                bench.process("chat", str(place), "--max-tokens", "2", said="hi\n"), key
            )

        return work

    for key, value in (
        ("rope_theta", 0),
        ("rope_theta", float("inf")),
        ("rms_norm_eps", -1),
        ("bos_token_id", 10**9),
        ("eos_token_id", 10**9),
    ):
        yield f"chat: {key} {value}", "refused by name", talked(key, value)

    def listed(name: str, pattern: str) -> Work:
        def work(bench: Bench) -> tuple[bool, str]:
            place = _copy(bench, "sums")
            (place / "checksums.json").write_text(json.dumps({name: "0" * 64}))
            return one_line(
                bench.process("import", str(place), "--out", "OUT", seconds=60), pattern
            )

        return work

    for name in (
        "/dev/zero",
        "/etc/shadow",
        "../model/config.json",
        "/etc/hostname",
        "",
        ".",
        "\0",
    ):
        yield (
            f"checksums.json: names {name!r}",
            "refused: a name is a name",
            listed(name, r"checksums\.json"),
        )

    def piped(name: str) -> Work:
        def work(bench: Bench) -> tuple[bool, str]:
            place = _copy(bench, "pipe")
            (place / "checksums.json").unlink(missing_ok=True)
            (place / name).unlink()
            os.mkfifo(place / name)

            return one_line(
                bench.process("import", str(place), "--out", "OUT", seconds=60), re.escape(name)
            )

        return work

    def device(name: str) -> Work:
        def work(bench: Bench) -> tuple[bool, str]:
            place = _copy(bench, "device")
            (place / "checksums.json").unlink(missing_ok=True)
            (place / name).unlink()
            (place / name).symlink_to("/dev/zero")

            return one_line(
                bench.process("import", str(place), "--out", "OUT", seconds=60), re.escape(name)
            )

        return work

    for name in ("config.json", "model.safetensors", "tokenizer.model"):
        yield f"{name}: a pipe", "one line, at once", piped(name)
        yield f"{name}: a device", "one line, at once", device(name)


# --- what reaches the terminal ---
def _shown() -> Iterator[tuple[str, str, Work]]:
    def header(bench: Bench) -> tuple[bool, str]:
        place = _copy(bench, "escapes")
        (place / "checksums.json").unlink(missing_ok=True)
        found = load_file(place / "model.safetensors")
        save_file(
            {**found, f"x{ESCAPES}": torch.zeros(1)}, place / "model.safetensors", {"format": "pt"}
        )

        return one_line(bench.process("import", str(place), "--out", "OUT"), "unknown")

    def config(key: str) -> Work:
        def work(bench: Bench) -> tuple[bool, str]:
            place = _copy(bench, "escapes")
            (place / "checksums.json").unlink(missing_ok=True)
            values = json.loads((place / "config.json").read_text())
            (place / "config.json").write_text(json.dumps({**values, key: f"x{ESCAPES}"}))

            return one_line(bench.process("import", str(place), "--out", "OUT"), key)

        return work

    def file_name(bench: Bench) -> tuple[bool, str]:
        return one_line(
            bench.process("import", str(bench.scratch / f"x{ESCAPES}"), "--out", "OUT"),
            "no |not |exist",
        )

    def column(bench: Bench) -> tuple[bool, str]:
        file = bench.scratch / "escapes.jsonl"
        file.write_text(json.dumps({f"x{ESCAPES}": 1}) + "\n")
        return one_line(
            bench.process(
                "prepare", "--kind", "dialogs", "--sources.s.path", str(file), "--out", "OUT"
            ),
            r"escapes\.jsonl",
        )

    def long(bench: Bench) -> tuple[bool, str]:
        place = _copy(bench, "long")
        (place / "checksums.json").unlink(missing_ok=True)
        values = json.loads((place / "config.json").read_text())
        (place / "config.json").write_text(
            json.dumps({**values, "num_hidden_layers": list(range(5000))})
        )

        return one_line(bench.process("import", str(place), "--out", "OUT"), "num_hidden_layers")

    yield "escapes: a tensor's name", "nothing unprintable on the terminal", header
    for key in ("hidden_act", "model_type", "architectures", "rope_theta"):
        yield f"escapes: {key}", "nothing unprintable on the terminal", config(key)

    yield "escapes: a path", "nothing unprintable on the terminal", file_name
    yield "escapes: a column", "nothing unprintable on the terminal", column
    yield "escapes: a flag", "nothing unprintable on the terminal", refused("", f"x{ESCAPES}")
    yield "a value of 5,000 items", "a line that can be read", long


# --- names that are paths ---
def _names() -> Iterator[tuple[str, str, Work]]:
    def source(name: str) -> Work:
        def work(bench: Bench) -> tuple[bool, str]:
            text = bench.scratch / "some.txt"
            text.write_text("the cat sat on a mat, and the sun and the moon were good to it")
            file = bench.scratch / "names.yaml"
            file.write_text(json.dumps({"sources": {name: {"path": str(text)}}, "heldout": 0}))
            before = set(bench.scratch.rglob("*"))
            got = bench.llama2("clean", str(file), "--out", "OUT")
            outside = [
                str(path)
                for path in set(bench.scratch.rglob("*")) - before
                if got.out not in (path, *path.parents)
            ]
            right, said = one_line(got, "sources|name")

            return right and not outside, f"{said} | outside: {outside}"

        return work

    for name in ("../../escaped", "/tmp/llama2-escaped", "a/b", "..", ".", "", "a\0b", "x\ny"):
        yield f"source named {name!r}", "refused: a name is a name", source(name)

    def step(name: str) -> Work:
        def work(bench: Bench) -> tuple[bool, str]:
            file = bench.scratch / "steps.yaml"
            file.write_text(json.dumps({"steps": {name: {"verb": "world", "scale": 0.01}}}))
            return one_line(bench.process("run", str(file), "--out", "OUT"), "step|name")

        return work

    for name in ("../../x", "/tmp/x", "a/b", "..", "", "logs", "recipe.yaml"):
        yield f"step named {name!r}", "refused: a name is a name", step(name)

    for verb, words in {
        "tokenizer": ("tokenizer", "--documents", "HERE/nul.jsonl"),
        "world": ("world", "--scale", "0.01"),
    }.items():
        yield (
            f"--out too long: {verb}",
            "one line",
            refused("long|name", *words, "--out", "/tmp/" + "x" * 300),
        )

    def loop(bench: Bench) -> tuple[bool, str]:
        place = bench.scratch / "loop"
        if not place.is_symlink():
            place.symlink_to(place)

        return one_line(
            bench.process("world", "--scale", "0.01", "--out", str(place / "x")),
            "loop|link|symbolic",
        )

    yield "--out in a loop of links", "one line", loop


# --- runs ---
def _reported(bench: Bench) -> Path:
    """A recipe directory with one finished step."""
    place = bench.scratch / "reported"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    assert bench.llama2("world", "--scale", "0.01", "--out", str(place / "world")).status == 0
    (place / "steps.json").write_text('["world"]')

    return place


def _runs() -> Iterator[tuple[str, str, Work]]:
    def made(bench: Bench) -> Path:
        place = bench.scratch / "finished"
        shutil.rmtree(place, ignore_errors=True)
        assert bench.llama2("world", "--scale", "0.01", "--out", str(place)).status == 0

        return place

    def damaged(name: str, change: Callable[[bytes], bytes], again: bool) -> Work:
        """A file of a finished run is damaged: its own command, and one that reads it, name the
        file."""

        def work(bench: Bench) -> tuple[bool, str]:
            place = made(bench)
            (place / name).write_bytes(change((place / name).read_bytes()))
            if again:
                got = bench.process("world", "--scale", "0.01", "--out", str(place))
            else:
                got = bench.process(
                    "sft",
                    "--model",
                    str(bench.model),
                    "--dialogs.a.path",
                    str(place / "demonstrations.jsonl"),
                    "--sequence-length",
                    "128",
                    "--training.plan.max-steps",
                    "1",
                    "--out",
                    "OUT",
                )

            return one_line(got, re.escape(name))

        return work

    half: Callable[[bytes], bytes] = lambda content: content[: len(content) // 2]  # noqa: E731
    empty: Callable[[bytes], bytes] = lambda content: b""  # noqa: E731
    for name in ("COMPLETE", "manifest.json"):
        for how, change in (
            ("empty", empty),
            ("half", half),
            ("a list", lambda content: b"[1]"),
            ("not UTF-8", lambda content: b"\xff" + content),
        ):
            for again in (True, False):
                yield (
                    f"{name} {how}: {'its own command' if again else 'the next step'}",
                    "one line that names it",
                    (damaged(name, change, again)),
                )

    def edited(content: bytes) -> bytes:
        return content.replace(b"the", b"THE", 1)

    def flipped(content: bytes) -> bytes:
        return content[:100] + bytes([content[100] ^ 1]) + content[101:]

    for how, change in (
        ("emptied", empty),
        ("halved", half),
        ("edited", edited),
        ("flipped", flipped),
    ):
        yield (
            f"a finished step's records {how}",
            "the next step names the file",
            damaged("demonstrations.jsonl", change, again=False),
        )

    def reported(name: str, content: str, pattern: str) -> Work:
        def work(bench: Bench) -> tuple[bool, str]:
            place = _reported(bench)
            (place / name).write_text(content)
            return one_line(
                bench.process("report", "--recipe", str(place), "--out", "OUT"), pattern
            )

        return work

    yield "steps.json [1]", "one line", reported("steps.json", "[1]", r"steps\.json")
    yield (
        "steps.json of paths",
        "one line",
        reported("steps.json", '["../../../etc"]', r"steps\.json|no run"),
    )
    yield "report: COMPLETE a number", "one line", reported("world/COMPLETE", "7", "COMPLETE")

    def evaluation(bench: Bench) -> tuple[bool, str]:
        place = _reported(bench)
        shutil.copytree(place / "world", place / "evaluate")
        manifest = json.loads((place / "evaluate" / "manifest.json").read_text())
        (place / "evaluate" / "manifest.json").write_text(
            json.dumps({**manifest, "verb": "evaluate"})
        )
        (place / "evaluate" / "evaluation.json").write_text('{"versions": ["x"]}')
        (place / "steps.json").write_text('["world", "evaluate"]')

        return one_line(
            bench.process("report", "--recipe", str(place), "--out", "OUT"),
            r"evaluation\.json|evaluate/manifest\.json",
        )

    yield "evaluation.json without results", "one line", evaluation
