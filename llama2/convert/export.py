"""`llama2 export CHECKPOINT --to FORMAT --out DIRECTORY`: a checkpoint as other programs read it.

What was written is read again and compared with where it came from, and only then is the export
done. A format that keeps every number must give every number back; one that rounds must be no
further away than its rounding explains, and the difference is printed. One tensor at a time is in
memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Literal, cast

import torch
from pydantic import Field

from llama2 import json_files, mesh
from llama2.config import Config as Base
from llama2.convert import verify
from llama2.convert.compare import context
from llama2.errors import UserError
from llama2.formats import gguf, gguf_metadata, hf, llama2c, meta
from llama2.formats.detect import open_model
from llama2.formats.progress import Reading, size
from llama2.formats.stored_model import StoredModel
from llama2.terminal_text import say
from llama2.tokenizer.tokenizer import Tokenizer

POSITIONAL = "checkpoint"
Kind = Literal["fp32", "fp16", "bf16"]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_KINDS = {"fp32": "f32", "fp16": "f16", "bf16": "bf16"}  # what llama.cpp calls them
ROUNDING = {"fp32": 2.0**-24, "fp16": 2.0**-11, "bf16": 2.0**-8, "q8_0": 1 / 127, "q4_0": 1 / 7}
"""the largest error of a number beside the largest number of its tensor that each kind explains"""

_BYTES = {"fp32": 4.0, "fp16": 2.0, "bf16": 2.0, "q8_0": 34 / 32, "q4_0": 18 / 32}
"""of a number, with its share of a block's scale"""


class Config(Base):
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
    """Write, verify, and print the path; the exit status: 1 if what was written is not the model
    that was read."""
    mesh.init()
    _check_options(config)
    source = open_model(config.checkpoint, base=config.base, dtype=DTYPES.get(config.dtype or ""))
    kind = _kind(config, source)
    target = _target(config, kind)

    for remark in source.remarks:
        say(f"llama2: note: {remark}")

    json_files.check_room(target, _bytes(config, source, kind), "a smaller --type or --dtype")
    if source.tokenizer is None:
        say(f"llama2: {config.checkpoint} has no tokenizer, so none is written")

    with Reading("write", size((source,))) as bar:
        for note in _write(config, bar.watched(source), target, kind):
            say(f"llama2: note: {note}")

    try:
        status = _verified(
            source, open_model(target), kind, _rounding(config, source, kind), config.length
        )
    # what was just written cannot be read: that is not the user's mistake
    except UserError as error:
        say(f"llama2: error: {error}")
        return 1

    if status == 0:
        print(target)

    return status


def _check_options(config: Config) -> None:
    """UserError for an option that the format has no use for."""
    one_file = config.to in ("gguf", "llama2c")
    if config.dtype is not None and one_file:
        raise UserError(f"--dtype does not go with --to {config.to}", "give --type")
    if config.type is not None and not one_file:
        raise UserError(f"--type does not go with --to {config.to}", "give --dtype")
    if config.shards != 1 and config.to != "meta":
        raise UserError(
            f"--shards does not go with --to {config.to}", "only Meta's format is cut for ranks"
        )
    if config.to == "llama2c" and config.type not in (None, "f32", "q8_0"):
        raise UserError(f"llama2.c has no {config.type}", "choose f32 (run.c) or q8_0 (runq.c)")


def _kind(config: Config, source: StoredModel) -> str:
    """What numbers will be stored as, a key of ROUNDING."""
    dtype = hf.find_prevailing_dtype(source.tensors)
    stored = next((name for name, kind in DTYPES.items() if kind == dtype), "fp32")
    if config.to in ("gguf", "llama2c"):
        asked = config.type or (None if config.to == "gguf" else "f32")
        return next((name for name, theirs in _KINDS.items() if theirs == asked), asked) or stored

    return config.dtype or stored


def _bytes(config: Config, source: StoredModel, kind: str) -> int:
    """About how many the weights will take."""
    each = source.tensors.values()
    if config.to in ("hf", "meta") and config.dtype is None:
        return sum(stored.nbytes for stored in each)

    return round(sum(stored.numel for stored in each) * _BYTES[kind])


def _rounding(config: Config, source: StoredModel, kind: str) -> float:
    """The largest error that storing a checkpoint so explains, beside a tensor's largest number; 0:
    there is none."""
    if config.to in ("hf", "meta") and config.dtype is None:
        return 0.0  # each tensor keeps its own kind

    exact = (
        {DTYPES[kind], *((torch.float16, torch.bfloat16) if kind == "fp32" else ())}
        if kind in DTYPES
        else set()
    )
    return (
        0.0 if all(stored.dtype in exact for stored in source.tensors.values()) else ROUNDING[kind]
    )


def _target(config: Config, kind: str) -> Path:
    """Where the export goes. UserError if something is there."""
    target, suffix = config.out, {"gguf": ".gguf", "llama2c": ".bin"}.get(config.to)
    if suffix and config.out.suffix != suffix:
        name = config.checkpoint.resolve()
        stem = name.stem if name.is_file() else name.name
        target = config.out / (
            f"{stem}-{_KINDS.get(kind, kind)}{suffix}" if config.to == "gguf" else f"model{suffix}"
        )

    taken = any(target.iterdir()) if target.is_dir() else target.exists()
    if taken:
        raise UserError(
            f"{target}: something is there already", "choose another --out, or move it away"
        )

    return target


def _write(config: Config, source: StoredModel, target: Path, kind: str) -> list[str]:
    """Write the checkpoint; what the user should know about it."""
    dtype = DTYPES.get(config.dtype or "")
    if config.to == "hf":
        hf.write(source, target, dtype=dtype, beside=_tokenizer_files(source))
        return []

    if config.to == "meta":
        return meta.write(source, target, dtype=dtype, shards=config.shards)
    if config.to == "llama2c":
        return llama2c.write(source, target, version=2 if kind == "q8_0" else 0)

    precision = cast(gguf_metadata.Precision, _KINDS.get(kind, kind))
    return gguf.write(
        source,
        target,
        precision=precision,
        chat_template=source.template,
        name=config.checkpoint.resolve().name,
    )


def _tokenizer_files(source: StoredModel) -> Callable[[Path], None]:
    """Writes what belongs beside the weights; a faulty tokenizer is refused now, not when the
    weights are written."""
    if source.tokenizer is None:
        return lambda directory: None

    return (
        Tokenizer.load(source.tokenizer)
        .with_chat_template(source.template, source.config.stops)
        .save
    )


def _verified(
    source: StoredModel, written: StoredModel, kind: str, allowed: float, length: int
) -> int:
    """Compare what was written with what was read, and say so; the exit status."""
    tolerance = math.inf if allowed else verify.TOLERANCE
    found = verify.compared(
        source,
        written,
        tolerance=tolerance,
        length=min(length, context(source.config, written.config)),
    )
    failures = found.differences(tolerance)
    apart = found.tensors.relative if found.tensors else 0.0

    if found.tensors and apart > allowed:
        failures.insert(
            0,
            f"{found.tensors.relative_name} differs by {apart:.3g} of its largest number, and {kind} "
            f"explains {allowed:.3g}",
        )

    for line in verify.lines(found, tolerance):
        say(line)

    if failures:
        say(
            f"llama2: error: {written.path} is not the model it was made from: {failures[0]}; do not use it"
        )
        return 1

    say(
        f"llama2: done: {written.path} holds "
        + (
            f"the original, rounded to {kind} by at most {apart:.2%} of the largest number of a tensor"
            if allowed
            else "every number of the original"
        )
    )
    return 0
