"""The undamaged files: one small model in every format, records in every packing, and the runs of a
small recipe."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import words
from commands import in_a_process, llama2
from journey import recipe
from safetensors.torch import save_file

from llama2 import records
from llama2.formats import checkpoint, gguf, hf, llama2c, meta
from llama2.formats.detect import open_model
from llama2.model.llama import Llama, LlamaConfig
from llama2.records import Dialog
from llama2.tokenizer import CHAT_TEMPLATE, Tokenizer, train

TEXTS = [
    "Hello, the old river mill.",
    "a\nb  c",
    "year 1987, 3.14",
    "日本語 été 🙂",
    "[INST] hi [/INST]",
    "  x ",
]
"""what a tokenizer is asked"""
DIALOG = {
    "messages": [
        {"role": "user", "content": "Where is the mill?"},
        {"role": "assistant", "content": "Here."},
    ]
}
ROWS: dict[str, list[dict[str, Any]]] = {
    "documents": [
        {"text": f"The mill number {n} stands by the river since 17{n:02}.", "id": n}
        for n in range(20)
    ],
    "dialogs": [DIALOG, {"instruction": "Say hi", "input": "now", "output": "hi"}][:1] * 2
    + [{"messages": [{"role": "system", "content": "Be short."}, *DIALOG["messages"]]}],
    "prompts": [{"prompt": f"Why is {n} a number?", "category": "sums"} for n in range(6)],
    "preferences": [
        {"prompt": f"Spell {n}.", "chosen": f"c-{n}", "rejected": f"k {n}"} for n in range(8)
    ],
}


def build(folder: Path) -> None:
    """Make all of them below `folder`. Takes a minute or two; nothing here depends on a seed of the
    fuzzing."""
    if (folder / "done").exists():
        return

    shutil.rmtree(folder, ignore_errors=True)  # what was begun
    folder.mkdir(parents=True)
    _runs(folder / "runs")
    _models(folder, folder / "runs" / "recipe" / "world" / "demonstrations.jsonl")
    _records(folder)
    _rows(folder / "rows", folder / "runs" / "recipe")
    words.write(folder)
    (folder / "done").touch()


# --- models ---
def _models(folder: Path, demonstrations: Path) -> None:
    torch.manual_seed(0)
    texts = [turn.content for one in records.read(Dialog, demonstrations) for turn in one.messages]
    tokenizer = train([f"[INST] {text} [/INST]" for text in texts], 420, folder / "tokenizer")
    model = Llama(LlamaConfig(420, 32, 48, 2, 4, 2, max_position_embeddings=128), 1)

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (parameter.dim() == 1))

    ours = folder / "ours"
    checkpoint.save(model, ours)
    tokenizer.save(ours)
    open_model(ours)
    source = hf.read(ours)
    hf.write(source, folder / "summed", beside=tokenizer.save)
    hf.write(source, folder / "shards", shard_bytes=40_000, beside=tokenizer.save)
    (folder / "shards" / "checksums.json").unlink()
    (ours / "checksums.json").unlink()
    (ours / "generation_config.json").write_text(
        json.dumps(
            {
                "bos_token_id": 1,
                "eos_token_id": [2],
                "do_sample": True,
                "temperature": 0.6,
                "transformers_version": "5.23.0",
            }
        )
    )
    _pickled(folder, ours)

    for shards in (1, 2):
        meta.write(source, folder / f"meta{shards}", shards=shards)
        tokenizer.save(folder / f"meta{shards}")

    for kind in ("f32", "q8_0", "q4_0"):
        (folder / f"gguf-{kind}").mkdir()
        gguf.write(
            source,
            folder / f"gguf-{kind}" / "model.gguf",
            precision=kind,
            chat_template=CHAT_TEMPLATE,
        )

    for version, name in ((0, "llama2c-f32"), (2, "llama2c-q8_0")):
        (folder / name).mkdir()
        llama2c.write(source, folder / name / "model.bin", version=version)

    _adapter(
        folder,
        "peft",
        lambda tensors, path: save_file(tensors, f"{path}/adapter_model.safetensors"),
    )
    _adapter(
        folder, "peft-bin", lambda tensors, path: torch.save(tensors, f"{path}/adapter_model.bin")
    )
    _tokenizer_json(folder, ours)


def _pickled(folder: Path, ours: Path) -> None:
    """pytorch_model.bin and consolidated.00.pth, as PyTorch writes them now and wrote them before
    1.6."""
    tensors = {name: stored.read() for name, stored in hf.read(ours).tensors.items()}
    for name, new in (("bin-new", True), ("bin-old", False)):
        _copy(ours, folder / name, leave={"model.safetensors"})
        torch.save(tensors, folder / name / "pytorch_model.bin", _use_new_zipfile_serialization=new)

    meta.write(hf.read(ours), folder / "meta-old", shards=1)
    Tokenizer.load(ours).save(folder / "meta-old")
    file = folder / "meta-old" / "consolidated.00.pth"
    torch.save(torch.load(file, weights_only=True), file, _use_new_zipfile_serialization=False)


def _adapter(folder: Path, name: str, write: Callable[[dict[str, Any], Path], None]) -> None:
    path = folder / name
    _copy(folder / "ours", path / "base")
    generator = torch.Generator().manual_seed(2)
    tensors = {}

    for layer in range(2):
        for module in ("q_proj", "v_proj"):
            out = 32 if module == "q_proj" else 16
            place = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            tensors[f"{place}.lora_A.weight"] = torch.randn(4, 32, generator=generator) * 0.1
            tensors[f"{place}.lora_B.weight"] = torch.randn(out, 4, generator=generator) * 0.1

    write(tensors, path)
    (path / "adapter_config.json").write_text(
        json.dumps(
            {
                "peft_type": "LORA",
                "task_type": "CAUSAL_LM",
                "r": 4,
                "lora_alpha": 8,
                "lora_dropout": 0.0,
                "bias": "none",
                "target_modules": ["q_proj", "v_proj"],
                "base_model_name_or_path": "base",
                "fan_in_fan_out": False,
                "inference_mode": True,
                "modules_to_save": None,
                "use_rslora": False,
                "use_dora": False,
                "rank_pattern": {},
                "alpha_pattern": {},
                "layers_to_transform": None,
            },
            indent=1,
        )
    )


def _tokenizer_json(folder: Path, ours: Path) -> None:
    """The directory that transformers 5 leaves: tokenizer.json and no tokenizer.model. Left out
    without it."""
    _copy(
        ours,
        folder / "json",
        leave={"tokenizer.model", "special_tokens_map.json", "tokenizer_config.json"},
    )
    code = (
        "import sys; from transformers import AutoTokenizer; "
        "AutoTokenizer.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2])"
    )
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(ours), str(folder / "json")],
        check=False,
        capture_output=True,
    )


def _copy(source: Path, target: Path, leave: frozenset[str] | set[str] = frozenset()) -> None:
    target.mkdir(parents=True)
    for file in source.iterdir():
        if file.name not in leave:
            (target / file.name).write_bytes(file.read_bytes())


# --- records ---
def _records(folder: Path) -> None:
    for kind, rows in ROWS.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
        for ending, content in {
            ".jsonl": lines,
            ".json": json.dumps(rows, indent=1).encode(),
            ".jsonl.gz": gzip.compress(lines),
            ".jsonl.bz2": bz2.compress(lines),
            ".jsonl.xz": lzma.compress(lines),
            ".jsonl.zst": _zstd(lines),
            ".zip": _zip(lines),
            ".parquet": _parquet(rows),
            ".csv": _table(rows, ","),
            ".tsv": _table(rows, "\t"),
        }.items():
            place = folder / f"{kind}{ending}"
            place.mkdir()
            (place / f"a{ending}").write_bytes(content)

    place = folder / "recipe.yaml"
    place.mkdir()
    recipe.write(place / "recipe.yaml")
    place = folder / "sft.yaml"
    place.mkdir()
    (place / "sft.yaml").write_text(SFT)


def _rows(folder: Path, recipe: Path) -> None:
    """Records as stages read them, as data of a user's own: a few lines of each."""
    folder.mkdir()
    for file in ("demonstrations", "prompts-train", "prompts-evaluation", "ghost-train"):
        _head(recipe / "world" / f"{file}.jsonl", folder / f"{file}.jsonl")

    _head(recipe / "collect" / "preferences.jsonl", folder / "preferences.jsonl")
    _head(next((recipe / "clean" / "documents").glob("*.jsonl")), folder / "documents.jsonl")


def _head(source: Path, target: Path) -> None:
    target.write_text(
        "".join(line + "\n" for line in source.read_text("utf-8").splitlines()[:12]), "utf-8"
    )


SFT = """model: BASE
dialogs: {a: {path: "DIALOGS", weight: 2}}
sequence_length: 64
batch_size: 4
epochs: 2
training:
  optimizer: {learning_rate: 1.0e-3}
  plan: {warmup_steps: 2}
"""


def _zstd(content: bytes) -> bytes:
    import zstandard

    return bytes(zstandard.ZstdCompressor(write_checksum=True).compress(content))


def _zip(content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.jsonl", content)

    return file.getvalue()


def _parquet(rows: list[dict[str, Any]]) -> bytes:
    import pyarrow
    from pyarrow import parquet

    file = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), file, write_page_checksum=True)

    return file.getvalue()


def _table(rows: list[dict[str, Any]], separator: str) -> bytes:
    names = list(rows[0])

    def cell(value: Any) -> str:
        text = value if isinstance(value, str) else json.dumps(value)
        return '"' + text.replace('"', '""') + '"'

    return "\n".join(
        separator.join(cell(row.get(name, "")) for name in names)
        for row in [dict(zip(names, names)), *rows]
    ).encode()


# --- runs ---
def _runs(folder: Path) -> None:
    """A finished recipe, and runs of three kinds that were stopped half-way."""
    folder.mkdir()
    place = recipe.write(folder / "recipe.yaml")
    root = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    made = subprocess.run(
        [sys.executable, "-m", "llama2.cli", "run", str(place), "--out", str(folder / "recipe")],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert made.returncode == 0, made.stderr[-2000:]
    _as_before(folder / "recipe", folder / "older")

    for name, asked, stop in (("training", TRAINING, {"step": 9}), ("parts", PARTS, {"part": 2})):
        out = folder / name
        status = in_a_process(
            folder / f"{name}.log", *_words(asked, folder, out), number=15, **stop
        )
        assert (out / "checkpoints").is_dir(), (
            f"{name}: {status}\n{(folder / f'{name}.log').read_text()}"
        )
        assert llama2(*_words(asked, folder, folder / f"{name}-whole")) == 0


def _as_before(recipe: Path, older: Path) -> None:
    """The runs of a recipe as they were before they had hashes of what they say about
    themselves."""
    shutil.copytree(recipe, older)
    for name, added in (("COMPLETE", {"records", "files", "sum"}), ("manifest.json", {"sum"})):
        for file in older.glob(f"*/{name}"):
            said = json.loads(file.read_text())
            file.write_text(
                json.dumps({key: value for key, value in said.items() if key not in added})
            )


TRAINING = (
    "sft",
    "--model",
    "RUNS/recipe/pretrain",
    "--dialogs.a.path",
    "RUNS/recipe/world/demonstrations.jsonl",
    "--sequence-length",
    "192",
    "--batch-size",
    "4",
    "--epochs",
    "1",
    "--training.plan.max-steps",
    "16",
    "--training.plan.save-every",
    "4",
    "--out",
    "OUT",
)
PARTS = (
    "rejection",
    "--policy",
    "RUNS/recipe/sft",
    "--rewards.helpful",
    "RUNS/recipe/helpful",
    "--prompts",
    "RUNS/recipe/world/prompts-train.jsonl",
    "--limit",
    "20",
    "--k",
    "4",
    "--temperatures",
    "1.0",
    "--sample.max-tokens",
    "8",
    "--sample.slots",
    "4",
    "--sample.part",
    "4",
    "--out",
    "OUT",
)


def _words(words: tuple[str, ...], runs: Path, out: Path) -> list[str]:
    return [word.replace("RUNS", str(runs)).replace("OUT", str(out)) for word in words]
