"""Cases of configuration: flags, YAML, and the names and references of a recipe."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from checks import Work, is_refusal, ok, refusal

if TYPE_CHECKING:
    from run import Bench, Got


def cases() -> Iterator[tuple[str, str, Work]]:
    """Name, what is expected, and the work."""

    def sft(*more: str) -> Callable[[Bench], Got]:
        return lambda bench: bench.llama2(
            "sft",
            "--model",
            str(bench.model),
            "--dialogs.a.path",
            bench.file("data/sft4.jsonl"),
            "--out",
            "OUT",
            *more,
            "--dry-run",
        )

    def recipe(text: str, *more: str) -> Callable[[Bench], Got]:
        def go(bench: Bench) -> Got:
            bench.count += 1
            file = bench.scratch / f"recipe{bench.count}.yaml"
            file.write_text(
                text.replace("MODEL", str(bench.model))
                .replace("DATA", bench.file("data/sft4.jsonl"))
                .replace("OUT", str(bench.scratch / f"recipe{bench.count}")),
                "utf-8",
            )

            return bench.llama2("run", str(file), *more)

        return go

    two = (
        "out: OUT\nparameters: {my-data: DATA}\nsteps:\n"
        '  sft-a: {verb: sft, model: MODEL, dialogs: {mine: {path: "${my-data}"}}}\n'
        '  sft-b: {verb: sft, model: MODEL, dialogs: {mine: {path: "${my-data}"}}}\n'
    )
    yield (
        "--epochs without a value",
        "refused",
        lambda b: refusal(sft("--epochs")(b), "epochs.*value"),
    )
    yield "--seed without a value", "refused", lambda b: refusal(sft("--seed")(b), "seed.*value")
    yield (
        "--epochs true",
        "a truth value is no number",
        lambda b: refusal(sft("--epochs", "true")(b), "epochs"),
    )
    yield "--seed -1", "out of range", lambda b: refusal(sft("--seed", "-1")(b), "seed")
    yield (
        "--seed 10^19",
        "out of range",
        lambda b: refusal(sft("--seed", "10000000000000000000")(b), "seed"),
    )
    yield (
        "weight .inf",
        "finite numbers only",
        lambda b: refusal(sft("--dialogs.a.weight", ".inf")(b), "weight|finite"),
    )
    yield (
        "max_steps 0",
        "refused, or nothing is trained",
        lambda b: refusal(sft("--training.plan.max-steps", "0")(b), "max.steps"),
    )
    yield (
        "max_steps false",
        "a truth value is no number",
        lambda b: refusal(sft("--training.plan.max-steps", "false")(b), "max.steps"),
    )
    yield (
        "--learning-rate",
        "the right key is suggested",
        lambda b: refusal(
            sft("--learning-rate", "1e-4")(b), r"--training\.optimizer\.learning-rate"
        ),
    )
    yield (
        "names with dashes",
        "kept letter by letter",
        lambda b: ok(
            sft(
                "--dialogs.open-assistant.path",
                b.file("data/sft4.jsonl"),
                "--dialogs.open-assistant.weight",
                "2",
            )(b),
            lambda got: "open-assistant" in got.said and "open_assistant" not in got.said,
        ),
    )
    yield (
        "rec: a parameter with a dash",
        "is a reference",
        lambda b: ok(
            recipe(two, "--dry-run")(b), lambda got: "${" not in got.said.partition("\nplan:")[2]
        ),
    )
    yield (
        "rec2: a misspelt parameter",
        "refused with a suggestion",
        lambda b: refusal(recipe(two, "--parameters.my-dta", "x", "--dry-run")(b), "my-data"),
    )
    yield (
        "rec2: a step left out",
        "is left out",
        lambda b: ok(
            recipe(two, "--steps.sft-b", "null", "--dry-run")(b),
            lambda got: "sft-b:" not in got.said.split("plan:")[-1],
        ),
    )
    yield (
        "rec2: a step that does not exist",
        "refused with a suggestion",
        lambda b: refusal(recipe(two, "--steps.sft-c", "null", "--dry-run")(b), "sft-[ab]"),
    )
    yield (
        "a reference to nothing",
        "refused before any work",
        lambda b: refusal(
            recipe(two.replace('"${my-data}"}}}\n', '"${my data}"}}}\n', 1), "--dry-run")(b),
            r"\$\{my data\}|my data",
        ),
    )

    for text, key in (
        ("seed: 010", "8"),
        ("sequence_length: 4:20", "260"),
        ("batch_size: true", "1"),
        ("epochs: on", "1"),
        ("epochs: yes", "1"),
    ):
        yield f"YAML `{text}`", f"never {key}", _yaml(text, key)


def _yaml(text: str, wrong: str) -> Work:
    def work(bench: Bench) -> tuple[bool, str]:
        file = bench.scratch / "one.yaml"
        file.write_text(
            f"model: {bench.model}\ndialogs: {{a: {{path: {bench.file('data/sft4.jsonl')}}}}}\n{text}\n",
            "utf-8",
        )
        got = bench.llama2("sft", str(file), "--out", "OUT", "--dry-run")
        key = text.partition(":")[0]
        right = is_refusal(got, key) or (
            got.status == 0 and not re.search(rf"^\s*{key}: {wrong}$", got.said, re.MULTILINE)
        )

        return right, got.short() if got.status else str(
            re.findall(rf"^\s*{key}: .*$", got.said, re.MULTILINE)
        )

    return work
