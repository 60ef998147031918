"""`llama2 export CHECKPOINT --to FORMAT --out DIRECTORY`: a checkpoint for other programs.

The written file is read again and compared with its source, and only then is the export done. A
format that keeps every number must give every number back; one that rounds must be no further away
than its rounding explains, and the difference is printed. One tensor at a time is in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Literal, cast

import torch
from pydantic import Field

from llama2 import json_files
from llama2.config import Config as Section
from llama2.convert import verify
from llama2.convert.compare import find_context
from llama2.errors import UserError
from llama2.formats import gguf, hf, llama2c, meta
from llama2.formats.detect import open_model
from llama2.formats.gguf_metadata import Precision
from llama2.formats.hf_directory import require_free
from llama2.formats.progress import ReadingBar
from llama2.formats.stored_model import StoredModel
from llama2.ranks import join
from llama2.terminal_text import say
from llama2.tokenizer.tokenizer import Tokenizer

POSITIONAL = "checkpoint"
Kind = Literal["fp32", "fp16", "bf16"]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_KINDS = {"fp32": "f32", "fp16": "f16", "bf16": "bf16"}  # what llama.cpp calls them
# the largest error of a number that each kind explains, divided by the largest of its tensor
ROUNDING = {"fp32": 2.0**-24, "fp16": 2.0**-11, "bf16": 2.0**-8, "q8_0": 1 / 127, "q4_0": 1 / 7}
# of a number, with its share of a block's scale
_BYTES = {"fp32": 4.0, "fp16": 2.0, "bf16": 2.0, "q8_0": 34 / 32, "q4_0": 18 / 32}


class Config(Section):
    """Write a checkpoint in another format, and verify what was written."""

    checkpoint: Path
    """what to export: a directory or file of any format that can be read"""
    to: Literal["hf", "meta", "gguf", "llama2c"]
    """Hugging Face (transformers, vLLM), Meta's own, GGUF (llama.cpp, Ollama), or llama2.c"""
    out: Path
    """directory to write, or for gguf and llama2c the file (.gguf, .bin); what is there already is
    not touched"""
    dtype: Kind | None = None
    """of hf and meta: what weights are converted to (default: as they are)"""
    type: Literal["f32", "f16", "bf16", "q8_0", "q4_0"] | None = None
    """of gguf: how numbers are stored (default: as they are); of llama2c: f32 (default), or q8_0
    for its runq.c"""
    shards: int = Field(1, ge=1)
    """of meta: files, one for each model-parallel rank that will load it"""
    base: Path | None = None
    """the model that an adapter belongs to, where its own word is wrong"""
    length: int = Field(512, ge=0)
    """tokens of the sequence on which logits of both are compared, at most the context; 0 compares
    tensors alone"""


def run(config: Config) -> int:
    """Write, verify, and print the path; return the exit status.

    It is 1 if the written model is not the one that was read.
    """
    join()
    _check_options(config)
    model = open_model(config.checkpoint, base=config.base, dtype=DTYPES.get(config.dtype or ""))
    kind = _choose_kind(config, model)
    target = _choose_target(config, kind)
    require_free(target)

    for remark in model.remarks:
        say(f"llama2: note: {remark}")

    json_files.check_room(target, _count_bytes(config, model, kind), "a smaller --type or --dtype")
    if model.tokenizer is None:
        say(f"llama2: {config.checkpoint} has no tokenizer, so none is written")

    with ReadingBar("write", model.count_bytes()) as bar:
        for note in _write(config, bar.watch(model), target, kind):
            say(f"llama2: note: {note}")

    try:
        status = _verify(config, model, open_model(target), kind)
    # a file that was just written and cannot be read is not the user's mistake
    except UserError as error:
        say(f"llama2: error: {error}")
        return 1

    if status == 0:
        print(target)

    return status


def _check_options(config: Config) -> None:
    """UserError for an option that the format has no use for."""
    one_file = config.to in ("gguf", "llama2c")
    useless = {
        "--dtype": (config.dtype is not None and one_file, "give --type"),
        "--type": (config.type is not None and not one_file, "give --dtype"),
        "--shards": (config.shards != 1 and config.to != "meta", "only Meta's format has ranks"),
    }
    for option, (given, cure) in useless.items():
        if given:
            raise UserError(f"{option} does not go with --to {config.to}", cure)

    if config.to == "llama2c" and config.type not in (None, "f32", "q8_0"):
        raise UserError(f"llama2.c has no {config.type}", "choose f32 (run.c) or q8_0 (runq.c)")


def _choose_kind(config: Config, model: StoredModel) -> str:
    """Return the kind of the numbers to store, a key of ROUNDING."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    stored = names.get(hf.find_prevailing_dtype(model.tensors), "fp32")
    if config.to in ("hf", "meta"):
        return config.dtype or stored
    if config.type is None:
        return stored if config.to == "gguf" else "fp32"

    ours = {theirs: name for name, theirs in _KINDS.items()}
    return ours.get(config.type, config.type)


def _keeps_kinds(config: Config) -> bool:
    """Return whether each tensor keeps its own kind of numbers."""
    return config.to in ("hf", "meta") and config.dtype is None


def _count_bytes(config: Config, model: StoredModel, kind: str) -> int:
    """Estimate the size of the weights."""
    return model.count_bytes() if _keeps_kinds(config) else round(model.numel * _BYTES[kind])


def _find_rounding(config: Config, model: StoredModel, kind: str) -> float:
    """Return the largest error that storing a checkpoint as `kind` explains; 0 if there is none.

    It is relative to the largest number of a tensor.
    """
    exact = {DTYPES.get(kind)}
    if kind == "fp32":
        exact |= {torch.float16, torch.bfloat16}

    kinds = {stored.dtype for stored in model.tensors.values()}
    return 0.0 if _keeps_kinds(config) or kinds <= exact else ROUNDING[kind]


def _choose_target(config: Config, kind: str) -> Path:
    """Return the place of the export: `--out`, or a file of a suitable name in it."""
    suffix = {"gguf": ".gguf", "llama2c": ".bin"}.get(config.to, config.out.suffix)
    if config.out.suffix == suffix:
        return config.out
    if config.to == "llama2c":
        return config.out / f"model{suffix}"

    source = config.checkpoint.resolve()
    stem = source.stem if source.is_file() else source.name
    return config.out / f"{stem}-{_KINDS.get(kind, kind)}{suffix}"


def _write(config: Config, model: StoredModel, target: Path, kind: str) -> list[str]:
    """Write the checkpoint; return notes for the user."""
    dtype = DTYPES.get(config.dtype or "")
    if config.to == "hf":
        hf.write(model, target, dtype=dtype, beside=_prepare_tokenizer(model))
        return []

    if config.to == "meta":
        return meta.write(model, target, dtype=dtype, shards=config.shards)
    if config.to == "llama2c":
        return llama2c.write(model, target, version=2 if kind == "q8_0" else 0)

    return gguf.write(
        model,
        target,
        precision=cast(Precision, _KINDS.get(kind, kind)),
        chat_template=model.template,
        name=config.checkpoint.resolve().name,
    )


def _prepare_tokenizer(model: StoredModel) -> Callable[[Path], None]:
    """Return a writer of the files beside the weights.

    A faulty tokenizer is refused now, not when the weights are written.
    """
    if model.tokenizer is None:
        return lambda directory: None

    tokenizer = Tokenizer.load(model.tokenizer)
    return tokenizer.with_chat_template(model.template, model.config.stops).save


def _verify(config: Config, model: StoredModel, written: StoredModel, kind: str) -> int:
    """Compare the written model with the one that was read, and say so; return the exit status."""
    allowed = _find_rounding(config, model, kind)
    tolerance = math.inf if allowed else verify.TOLERANCE
    length = min(config.length, find_context(model.config, written.config))
    comparison = verify.compare_models(model, written, tolerance=tolerance, length=length)
    failures = comparison.differences(tolerance)
    tensors = comparison.tensors
    if tensors and tensors.relative > allowed:
        failures.insert(
            0,
            f"{tensors.relative_name} differs by {tensors.relative:.3g} of its largest number, and "
            f"{kind} explains {allowed:.3g}",
        )

    for line in verify.describe(comparison, tolerance):
        say(line)

    if failures:
        say(
            f"llama2: error: {written.path} is not the model it was made from: {failures[0]}; do "
            "not use it"
        )
        return 1

    content = "every number of the original"
    if allowed and tensors:
        content = (
            f"the original, rounded to {kind} by at most {tensors.relative:.2%} of the largest "
            "number of a tensor"
        )

    say(f"llama2: done: {written.path} holds {content}")
    return 0
