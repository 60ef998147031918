"""Which files are damaged, which command then reads them, and how a wrong acceptance is told.

A command that accepts a damaged file is judged by what the format lets a reader know:

  SUMS   a hash that was recorded covers the file (checksums.json, COMPLETE, the index of token shards): no change at
         all may be accepted
  CRC    the container has checksums of its contents (zip, gzip, bzip2, xz, zstd, Parquet pages): whatever is accepted
         must be what the undamaged file gives (of Parquet its pages: names of columns have none)
  OPEN   nothing covers the file: what is accepted must be sane. Of a model: the configuration in range, ids inside
         the vocabulary, every text encoded to ids of the model, finite logits, or else `chat`
         refuses to talk to it.
         Of records: valid UTF-8 and JSON
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mutations import BINARY, BYTES, JSON, LINES, SAFETENSORS, YAML, Mutation, in_pages
from originals import PARTS, TEXTS, TRAINING
from words import RIGHT, WITHOUT_OUT, in_values, in_words

from llama2.formats import checkpoint
from llama2.tokenizer import Tokenizer

SUMS, CRC, OPEN = "sums", "crc", "open"
Facts = dict[str, Any]


@dataclass(frozen=True)
class Group:
    """`file` below the folder `original` is damaged, in a copy of that folder; `words` is the
    command that reads it.

    In `words`, IN is the copy, ALL the folder of all undamaged files, OUT a directory of the
    command's own.
    """

    name: str
    original: str
    file: str
    mutations: tuple[Mutation, ...]
    words: tuple[str, ...]
    oracle: str
    look: Callable[[Path], Facts]
    weight: float = 1.0
    """how much of all mutations it gets"""


# --- what a command made ---
class Insane(Exception):
    """What was accepted cannot be right."""


def model(out: Path) -> Facts:
    """What identifies an imported model. Insane if it cannot be used, though it was accepted."""
    values = json.loads((out / "config.json").read_text())
    vocabulary = values["vocab_size"]
    for name in ("rope_theta", "rms_norm_eps"):
        if not (isinstance(values[name], int | float) and 0 < values[name] < math.inf):
            raise Insane(f"{name} is {values[name]}")

    for name in ("bos_token_id", "eos_token_id"):
        ids = values[name] if isinstance(values[name], list) else [values[name]]
        if not all(isinstance(one, int) and 0 <= one < vocabulary for one in ids):
            raise Insane(f"{name} is {values[name]} of a vocabulary of {vocabulary}")

    found = checkpoint.load(out)
    digest = hashlib.sha256()
    for tensor in found.state_dict().values():
        digest.update(tensor.contiguous().numpy().tobytes())

    facts = {"weights": digest.hexdigest(), "config": values, "ids": None}
    if (out / "tokenizer.model").exists():
        tokenizer = Tokenizer.load(out)
        facts["ids"] = [tokenizer.encode(text) for text in TEXTS]
        if any(not 0 <= one < vocabulary for ids in facts["ids"] for one in ids):
            raise Insane("the tokenizer gives ids that the model has not")

        for ids in facts["ids"]:
            tokenizer.decode(ids)

    length = min(8, values["max_position_embeddings"])
    with torch.no_grad():
        logits = found(torch.arange(3, 3 + length)[None] % vocabulary)

    facts["finite"] = bool(logits.isfinite().all())
    return facts


def written(*patterns: str) -> Callable[[Path], Facts]:
    """The content of the files that a run wrote; lines of JSON must be that."""

    def look(out: Path) -> Facts:
        found: Facts = {}
        for path in sorted(path for pattern in patterns for path in out.glob(pattern)):
            content = path.read_bytes()
            if path.suffix == ".jsonl":
                for line in content.decode("utf-8").split("\n"):
                    if line:
                        json.loads(line)

            found[path.name] = hashlib.sha256(content).hexdigest()

        return found

    return look


def nothing(out: Path) -> Facts:
    return {}


WEIGHTS = written("model*.safetensors")


# --- the groups ---
IMPORT = ("import", "IN", "--out", "OUT")


def _imports() -> Iterator[Group]:
    def one(
        name: str,
        original: str,
        file: str,
        mutations: Sequence[Mutation],
        oracle: str = OPEN,
        words: tuple[str, ...] = IMPORT,
        weight: float = 1.0,
    ) -> Group:
        return Group(name, original, file, tuple(mutations), words, oracle, model, weight)

    yield one("safetensors", "ours", "model.safetensors", SAFETENSORS)
    yield one("config", "ours", "config.json", JSON, weight=1.5)
    yield one("generation_config", "ours", "generation_config.json", JSON, weight=0.5)
    yield one("tokenizer.model", "ours", "tokenizer.model", BINARY)
    yield one("tokenizer_config", "ours", "tokenizer_config.json", JSON, weight=0.5)
    yield one("tokenizer.json", "json", "tokenizer.json", JSON, weight=0.7)
    yield one("sharded", "shards", "model-*.safetensors", SAFETENSORS)
    yield one("index", "shards", "model.safetensors.index.json", JSON)
    yield one("checksummed", "summed", "*", BYTES, SUMS)
    yield one("checksums", "summed", "checksums.json", JSON)
    yield one("bin-new", "bin-new", "pytorch_model.bin", BINARY, CRC)
    yield one("bin-old", "bin-old", "pytorch_model.bin", BINARY)
    yield one("pth-new", "meta1", "consolidated.00.pth", BINARY, CRC)
    yield one("pth-two", "meta2", "consolidated.01.pth", BINARY, CRC, weight=0.5)
    yield one("pth-old", "meta-old", "consolidated.00.pth", BINARY)
    yield one("params", "meta1", "params.json", JSON)

    for kind in ("f32", "q8_0", "q4_0"):
        yield one(
            f"gguf-{kind}",
            f"gguf-{kind}",
            "model.gguf",
            BINARY,
            words=("import", "IN/model.gguf", "--out", "OUT"),
        )

    for kind in ("f32", "q8_0"):
        yield one(
            f"llama2c-{kind}",
            f"llama2c-{kind}",
            "model.bin",
            BINARY,
            words=("import", "IN/model.bin", "--out", "OUT"),
        )

    yield one(
        "tokenizer.bin",
        "llama2c-f32",
        "tokenizer.bin",
        BINARY,
        words=("import", "IN/model.bin", "--out", "OUT"),
    )
    joined = ("import", "IN", "--base", "IN/base", "--out", "OUT")
    yield one("adapter_config", "peft", "adapter_config.json", JSON, words=joined)
    yield one("adapter_model", "peft", "adapter_model.safetensors", SAFETENSORS, words=joined)
    yield one("adapter_bin", "peft-bin", "adapter_model.bin", BINARY, CRC, words=joined)


_DATA = {
    ".jsonl": (LINES, OPEN),
    ".json": (JSON, OPEN),
    ".csv": (BYTES, OPEN),
    ".tsv": (BYTES, OPEN),
    ".jsonl.gz": (BYTES, CRC),
    ".jsonl.bz2": (BYTES, CRC),
    ".jsonl.xz": (BYTES, CRC),
    ".jsonl.zst": (BYTES, CRC),
    ".zip": (BINARY, CRC),
    ".parquet": ((in_pages,), CRC),
}


def _prepared() -> Iterator[Group]:
    """What strangers' data become: `prepare` for dialogs, prompts and pairs, `clean` for
    documents."""
    for kind in ("dialogs", "prompts", "preferences", "documents"):
        for ending, (mutations, oracle) in [*_DATA.items(), (".parquet", (BINARY, OPEN))]:
            words = (
                ("clean", "--sources.a.path", f"IN/a{ending}", "--heldout", "0", "--out", "OUT")
                if kind == "documents"
                else (
                    "prepare",
                    "--kind",
                    kind,
                    "--sources.a.path",
                    f"IN/a{ending}",
                    "--out",
                    "OUT",
                )
            )
            name = f"{kind}{ending}{':whole' if ending == '.parquet' and oracle == OPEN else ''}"
            yield Group(
                name,
                f"{kind}{ending}",
                f"a{ending}",
                mutations,
                words,
                oracle,
                written("*s.jsonl", "documents/*.jsonl"),
                1.0 if ending == ".jsonl" else 0.4,
            )


RECIPE = "runs/recipe"
SMALL = ("--sequence-length", "64", "--batch-size", "8", "--training.plan.max-steps", "1")
_NEXT: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "tokenize": (
        ("tokens-*.bin", "documents-*.bin", "index.json", "tokenizer.model"),
        (
            "pretrain",
            "--shards",
            "IN",
            "--architecture.hidden-size",
            "16",
            "--architecture.num-hidden-layers",
            "1",
            "--architecture.num-attention-heads",
            "2",
            "--architecture.num-key-value-heads",
            "2",
            "--architecture.intermediate-size",
            "24",
            "--architecture.max-position-embeddings",
            "64",
            "--training.plan.warmup-steps",
            "0",
            *SMALL,
        ),
    ),
    "sft": (
        ("model.safetensors", "config.json", "tokenizer.model", "tokenizer_config.json"),
        (
            "sft",
            "--model",
            "IN",
            "--dialogs.a.path",
            "ALL/runs/recipe/world/demonstrations.jsonl",
            *SMALL,
        ),
    ),
    "distill": (
        ("dialogs.jsonl",),
        ("sft", "--model", "ALL/runs/recipe/sft", "--dialogs.a.path", "IN/dialogs.jsonl", *SMALL),
    ),
    "rejection": (
        ("pool.jsonl",),
        ("sft", "--model", "ALL/runs/recipe/sft", "--dialogs.a.path", "IN/pool.jsonl", *SMALL),
    ),
    "collect": (
        ("preferences.jsonl",),
        (
            "reward",
            "--model",
            "ALL/runs/recipe/sft",
            "--preferences.a.path",
            "IN/preferences.jsonl",
            "--batch-size",
            "8",
            "--training.plan.max-steps",
            "1",
        ),
    ),
    "clean": (
        ("documents/*.jsonl",),
        ("tokenize", "--documents", "IN", "--tokenizer", "ALL/runs/recipe/tokenizer"),
    ),
    "world": (
        ("prompts-train.jsonl",),
        (
            "rejection",
            "--policy",
            "ALL/runs/recipe/sft",
            "--rewards.helpful",
            "ALL/runs/recipe/helpful",
            "--prompts",
            "IN/prompts-train.jsonl",
            "--limit",
            "2",
            "--k",
            "1",
            "--temperatures",
            "1.0",
            "--sample.max-tokens",
            "2",
        ),
    ),
}


def _runs() -> Iterator[Group]:
    """A finished run's outputs before the next step reads them, and the files that say what it
    is."""
    for verb, (names, words) in _NEXT.items():
        for name in names:
            mutations = (
                LINES if name.endswith(".jsonl") else JSON if name.endswith(".json") else BYTES
            )
            yield Group(
                f"{verb}:{name.replace('/', ':')}",
                f"{RECIPE}/{verb}",
                f"**/{name}",
                mutations,
                (*words, "--out", "OUT"),
                SUMS,
                nothing,
                0.4,
            )

    for verb in ("tokenize", "sft", "distill"):
        words = (*_NEXT[verb][1], "--out", "OUT")
        for name in ("COMPLETE", "manifest.json"):
            yield Group(f"{verb}:{name}", f"{RECIPE}/{verb}", name, JSON, words, OPEN, nothing, 0.5)


def _unfinished() -> Iterator[Group]:
    """Runs that were stopped: what is resumed must come out as if nothing had happened, or be
    refused."""
    training = tuple(word.replace("RUNS", "ALL/runs").replace("OUT", "IN") for word in TRAINING)
    sampling = tuple(word.replace("RUNS", "ALL/runs").replace("OUT", "IN") for word in PARTS)
    for name, mutations, oracle in (
        ("state.pt", BINARY, CRC),
        ("metrics.jsonl", LINES, CRC),
        ("manifest.json", JSON, OPEN),
        ("config.yaml", BYTES, CRC),
        (".seconds", BYTES, CRC),
        ("warnings.json", JSON, CRC),
    ):
        yield Group(
            f"resume:{name.rpartition('/')[2]}",
            "runs/training",
            f"**/{name}",
            mutations,
            training,
            oracle,
            WEIGHTS,
            0.5,
        )

    for name in ("COMPLETE", "manifest.json"):
        yield Group(
            f"again:{name}", "runs/training-whole", name, JSON, training, OPEN, nothing, 0.5
        )

    yield Group(
        "resume:parts",
        "runs/parts",
        "checkpoints/parts/*.jsonl",
        LINES,
        sampling,
        CRC,
        written("pool.jsonl", "best.jsonl"),
        1.0,
    )


def _read_again() -> Iterator[Group]:
    """What the report reads of a recipe (no summary of reward models), and recipes and
    configurations themselves."""
    report = ("report", "--recipe", "IN", "--out", "OUT")
    for file, mutations, oracle in (
        ("steps.json", JSON, OPEN),
        ("evaluate/evaluation.json", JSON, SUMS),
        ("helpful/accuracy.json", JSON, SUMS),
        ("*/metrics.jsonl", LINES, OPEN),
        ("[cdprtw]*/summary.json", JSON, SUMS),
        ("*/COMPLETE", JSON, OPEN),
        ("*/manifest.json", JSON, OPEN),
        ("*/warnings.json", JSON, OPEN),
        ("v1/verdict.json", JSON, SUMS),
        ("evaluate/attention.json", JSON, SUMS),
    ):
        yield Group(
            f"report:{file.rpartition('/')[2]}",
            RECIPE,
            file,
            mutations,
            report,
            oracle,
            nothing,
            0.5,
        )

    for file, mutations in (
        ("*/metrics.jsonl", LINES),
        ("*/COMPLETE", JSON),
        ("*/manifest.json", JSON),
        ("*/warnings.json", JSON),
    ):
        yield Group(
            f"older:{file.rpartition('/')[2]}",
            "runs/older",
            file,
            mutations,
            report,
            OPEN,
            nothing,
            0.5,
        )

    yield Group(
        "verify:steps.json", "runs/older", "steps.json", JSON, ("verify", "IN"), OPEN, nothing, 0.3
    )
    yield Group(
        "release",
        "runs/older",
        "*/manifest.json",
        JSON,
        ("release", "IN/v1", "--out", "OUT"),
        OPEN,
        nothing,
        0.5,
    )
    yield Group(
        "recipe.yaml",
        "recipe.yaml",
        "recipe.yaml",
        YAML,
        ("run", "IN/recipe.yaml", "--out", "OUT", "--dry-run"),
        OPEN,
        nothing,
    )
    yield Group(
        "sft.yaml",
        "sft.yaml",
        "sft.yaml",
        YAML,
        (
            "sft",
            "IN/sft.yaml",
            "--model",
            "ALL/runs/recipe/sft",
            "--dialogs.a.path",
            "ALL/runs/recipe/world/demonstrations.jsonl",
            "--out",
            "OUT",
            "--dry-run",
        ),
        OPEN,
        nothing,
    )


_ROWS = {
    "sft": ("--dialogs.a.path", "demonstrations"),
    "reward": ("--preferences.a.path", "preferences"),
    "collect": ("--prompts", "prompts-train"),
    "rejection": ("--prompts", "prompts-train"),
    "ppo": ("--prompts", "prompts-train"),
    "ghost": ("--conversations", "ghost-train"),
    "distill": ("--prompts", "prompts-train"),
    "evaluate": ("--prompts", "prompts-evaluation"),
    "select": ("--prompts", "prompts-evaluation"),
    "tokenizer": ("--documents", "documents"),
}


def _asked() -> Iterator[Group]:
    """Rows that stages read, configurations, and what is typed."""
    for verb, (flag, name) in _ROWS.items():
        typed = list(RIGHT[verb])
        typed[typed.index(flag) + 1] = f"IN/{name}.jsonl"
        yield Group(
            f"rows:{verb}",
            "rows",
            f"{name}.jsonl",
            LINES,
            (verb, *typed, "--out", "OUT"),
            OPEN,
            nothing,
            0.8,
        )

    for verb in RIGHT:
        yield Group(
            f"words:{verb}",
            f"words/{verb}",
            "words.json",
            (in_words,),
            ("WORDS", "--dry-run"),
            OPEN,
            nothing,
            0.5,
        )
        if verb not in ("world", "serve", "chat"):
            yield Group(
                f"values:{verb}",
                f"words/{verb}",
                "words.json",
                (in_values,),
                ("WORDS",),
                OPEN,
                nothing,
                0.5,
            )

        if verb not in WITHOUT_OUT and verb not in (
            "import",
            "export",
            "release",
            "report",
            "prepare",
        ):
            yield Group(
                f"config:{verb}",
                f"runs/recipe/{_STEP_OF.get(verb, verb)}",
                "config.yaml",
                YAML,
                (verb, "IN/config.yaml", "--out", "OUT", "--dry-run"),
                OPEN,
                nothing,
                0.4,
            )


_STEP_OF = {"reward": "helpful", "select": "v1", "ppo": "v2"}


def groups() -> list[Group]:
    """Every group, those of models first."""
    return [
        group
        for each in (_imports, _prepared, _runs, _unfinished, _read_again, _asked)
        for group in each()
    ]
