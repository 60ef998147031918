"""`llama2 import PATH --out DIRECTORY`: any Llama checkpoint as one of ours.

The format at the path is recognised: a Hugging Face directory, an adapter of PEFT (merged into its
base), Meta's own files, a file of llama2.c or of llama.cpp. Whatever can be refused is refused
before anything is written, and tensors pass one at a time, so that a model of any size can be
brought in with little memory. The directory appears when everything is in it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from llama2 import json_files
from llama2.config import Config as Section
from llama2.errors import UserError
from llama2.formats import hf, llama2c_vocabulary
from llama2.formats.detect import open_model
from llama2.formats.hf_directory import require_free
from llama2.formats.progress import ReadingBar
from llama2.formats.safetensors_file import is_finite
from llama2.formats.stored_model import StoredModel, StoredTensor, list_variations, observe
from llama2.stages.common.planning import Cluster, PlannedRuns
from llama2.terminal_text import list_some, say
from llama2.tokenizer.chat_settings import ADDED, MODEL, SETTINGS, SPECIAL, name_template
from llama2.tokenizer.sentencepiece_model import require_fitting_size
from llama2.tokenizer.stored import StoredTokenizer
from llama2.tokenizer.template import (
    TemplateName,
    check_template,
    choose_template,
    describe_template,
)
from llama2.tokenizer.tokenizer import Tokenizer

POSITIONAL = "path"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Config(Section):
    """Bring in a Llama checkpoint of any format. Its format is recognised."""

    path: Path
    """what to bring in: a Hugging Face, PEFT or Meta directory, a GGUF file, or one of llama2.c"""
    out: Path
    """directory to write, which must not hold anything yet"""
    dtype: Literal["fp32", "bf16", "fp16"] | None = None
    """precision to store; empty: as it is (quantized weights become what their reader makes of
    them)"""
    base: Path | None = None
    """of an adapter: the model that it was trained upon; empty: as the adapter says"""
    tokenizer: Path | None = None
    """a tokenizer.model, tokenizer.json or llama2.c's .bin, or a directory that has one; empty:
    what comes with it"""
    chat_template: TemplateName | Path | None = None
    """write this template, whatever the model has: a name, or a file of Jinja; for a model that was
    tuned for a format and does not say so"""


def plan(config: Config, cluster: Cluster, planned: PlannedRuns) -> dict[str, Any]:
    """Describe the checkpoint, where it exists already."""
    if not config.path.exists():
        return {}

    model, dtype = _open(config)
    return {"recognised": _describe(model), "gigabytes": round(model.count_bytes(dtype) / 1e9, 3)}


def run(config: Config) -> None:
    """Write the checkpoint directory, and say what was found and checked."""
    require_free(config.out)
    model, dtype = _open(config)
    tokenizer, remark = _load_tokenizer(model, config)
    json_files.check_room(config.out, model.count_bytes(dtype), "a smaller --dtype")
    _say(f"{model.path}: {_describe(model)}")
    for line in model.remarks:
        _say(line)

    _say(f"{config.out}: {_describe_size(model, dtype)}")
    with ReadingBar("import", model.count_bytes()) as bar:
        hf.write(
            bar.watch(observe(_add_eos(model, tokenizer), _check_finite)),
            config.out,
            dtype=dtype,
            beside=tokenizer.save if tokenizer else lambda directory: None,
        )

    _say(f"{len(model.tensors)} tensors, all numbers finite; {remark}")
    if tokenizer:
        _say_template(model, config, tokenizer)

    print(config.out)


def _open(config: Config) -> tuple[StoredModel, torch.dtype | None]:
    dtype = DTYPES[config.dtype] if config.dtype else None
    return open_model(config.path, base=config.base, dtype=dtype), dtype


# --- the tokenizer ---
def _load_tokenizer(model: StoredModel, config: Config) -> tuple[Tokenizer | None, str]:
    """Return the tokenizer given or found, and a remark on it; None if there is neither.

    One with fewer pieces than the model is padded to a name for each id. UserError if it has more.
    """
    place, size = _find_tokenizer(model, config), model.config.vocab_size
    if place is None:
        return None, (
            "no tokenizer came with it: it can be neither trained nor talked to before its "
            f"{MODEL} lies in {config.out} (or import it again with --tokenizer "
            f"FILE){_suggest_files(model)}"
        )

    tokenizer = Tokenizer.load(place, size)
    tokenizer.require_bos(model.path, model.config.bos_token_id)
    count, ids = tokenizer.vocab_size, (tokenizer.bos, tokenizer.eos)
    if count > size:
        require_fitting_size(
            place, count, size, "give the model's own: --tokenizer tokenizer.model"
        )

    special = [ascii(name) for name, token in tokenizer.controls.items() if token not in ids]
    control = f", of which no text spells {list_some(special)}" if special else ""
    remark = f"the tokenizer has {count:,} pieces, as the model{control}"
    if count < size:
        tokenizer = tokenizer.pad(size)
        remark = (
            f"the tokenizer has {count:,} pieces{control}, the model {size:,}: the other "
            f"{size - count:,} are padding now, which no text spells"
        )

    template, origin = model.template, name_template(model.path)
    if config.chat_template is not None:
        template, origin = choose_template(str(config.chat_template))

    return tokenizer.with_chat_template(template, model.config.stops, origin), remark


def _find_tokenizer(model: StoredModel, config: Config) -> Path | StoredTokenizer | None:
    """Return the place of the tokenizer: given, or the one that came with the checkpoint."""
    given = config.tokenizer
    if given is not None:
        if given.suffix == ".bin" and given.is_file():
            return llama2c_vocabulary.open_tokenizer(given, model.config.vocab_size)

        return given

    if model.path.is_dir() and str(model.tokenizer) == str(model.path / MODEL):
        return model.path  # where it is compared with the tokenizer.json beside it

    return model.tokenizer


def _suggest_files(model: StoredModel) -> str:
    """Name files beside a model that look like its tokenizer under another name."""
    directory = model.path if model.path.is_dir() else model.path.parent
    others = (SETTINGS, SPECIAL, ADDED, model.path.name)
    files = [
        str(file)
        for file in sorted(directory.glob("*tok*"))
        if file.suffix in (".model", ".bin", ".json") and file.name not in others
    ]
    return f"; it may be {' or '.join(files[:3])}" if files else ""


def _add_eos(model: StoredModel, tokenizer: Tokenizer | None) -> StoredModel:
    """Return the same checkpoint, whose answers end at the tokenizer's EOS as well."""
    if tokenizer is None or tokenizer.eos in model.config.stops:
        return model

    stops = (*model.config.stops, tokenizer.eos)
    return replace(model, config=replace(model.config, eos_token_id=stops))


# --- messages ---
def _say_template(model: StoredModel, config: Config, tokenizer: Tokenizer) -> None:
    """Say what became of the chat template, and what follows from it."""
    name = describe_template(model.template)
    if config.chat_template is not None:
        before = "it had none" if model.template is None else f"the model's was {name}"
        chosen = describe_template(tokenizer.template)
        _say(f"its chat template is {chosen}, as asked; {before}")
    elif model.template is None:
        _say(
            "no chat template came with it: it can be trained, and talked to after sft (or at "
            "once, if it was tuned for a format: import it with, say, --chat-template llama2)"
        )
        return

    try:
        check_template(config.out, tokenizer)
    except UserError as error:
        _say(f"its chat template is {name}, and is kept, but cannot be used here: {error}")
    else:
        if config.chat_template is None:
            _say(f"its chat template is {name}, and is kept")


def _describe(model: StoredModel) -> str:
    shape = model.config
    kinds = {str(stored.dtype).removeprefix("torch.") for stored in model.tensors.values()}
    kinds = {*model.quantized, "float32"} if model.quantized else kinds
    kind = "reward" if model.scorer else "language"
    variations = "".join(f", {variation}" for variation in list_variations(shape))
    return (
        f"{model.format}, a {kind} model of {model.numel:,} parameters in "
        f"{', '.join(sorted(kinds))}: {shape.num_hidden_layers} layers of width "
        f"{shape.hidden_size:,}, {shape.num_attention_heads} heads, {shape.num_key_value_heads} "
        f"for keys and values, context {shape.max_position_embeddings:,}, vocabulary "
        f"{shape.vocab_size:,}{variations}"
    )


def _describe_size(model: StoredModel, dtype: torch.dtype | None) -> str:
    """Describe how much is written, and name the flag for less where it is more than before."""
    written = model.count_bytes(dtype)
    size = f"the weights take {_format_size(written)}"
    if dtype is not None or not model.path.is_file():
        return size  # a directory stores numbers as they will be written

    before = model.path.stat().st_size
    if written < 1.25 * before:
        return size

    halved = _format_size(model.count_bytes(torch.bfloat16))
    return f"{size}, in {model.path} {_format_size(before)}; --dtype bf16 takes {halved}"


def _format_size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def _check_finite(stored: StoredTensor, tensor: Tensor) -> None:
    if not is_finite(tensor):
        raise UserError(
            f"{stored.place} has numbers that are infinite or undefined",
            "the file is damaged, or the model had diverged: fetch it again",
        )


def _say(line: str) -> None:
    say(f"llama2: {line}")
