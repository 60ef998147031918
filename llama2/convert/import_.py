"""Any Llama checkpoint as one of ours: `llama2 import PATH --out DIRECTORY`.

What lies at the path is recognised: a Hugging Face directory, an adapter of PEFT (merged into its
base), Meta's own files, a file of llama2.c or of llama.cpp. Whatever can be refused is refused
before anything is written, and tensors pass one at a time, so that a model of any size can be
brought in with little memory. The directory appears when all of it is there.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from llama2 import config, json_files, mesh
from llama2.errors import UserError, explain_os_errors
from llama2.formats import hf, llama2c_vocabulary
from llama2.formats.detect import open_model
from llama2.formats.progress import Reading, size
from llama2.formats.safetensors_file import is_finite
from llama2.formats.stored_model import StoredModel, StoredTensor, observe
from llama2.stages.common.planning import Cluster, Lineage
from llama2.terminal_text import say
from llama2.tokenizer import chat_settings, sentencepiece_model
from llama2.tokenizer.sentencepiece_model import StoredTokenizer
from llama2.tokenizer.template import CHAT_TEMPLATE, describe_template, is_llama_2
from llama2.tokenizer.tokenizer import Tokenizer

POSITIONAL = "path"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Config(config.Config):
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
    chat_template: Literal["llama2"] | None = None
    """write Llama 2's, whatever the model has: for one that was tuned for that format and does not
    say so"""


def plan(config: Config, cluster: Cluster, lineage: Lineage) -> dict[str, Any]:
    """What was recognised, where it exists already."""
    if not config.path.exists():
        return {}

    source = _opened(config)
    return {"recognised": _described(source), "gigabytes": round(_size(source, config) / 1e9, 3)}


def run(config: Config) -> None:
    """Write the checkpoint directory, and say what was found and checked."""
    if not mesh.is_main():
        return

    with explain_os_errors(config.out):
        if config.out.exists() and (not config.out.is_dir() or any(config.out.iterdir())):
            raise UserError(
                f"{config.out}: there is something already", "choose another --out, or move it away"
            )

    source = _opened(config)
    tokenizer, remark = _tokenizer(source, config)
    json_files.check_room(config.out, _size(source, config), "a smaller --dtype")
    _say(f"{source.path}: {_described(source)}")

    for line in source.remarks:
        _say(line)

    _say(f"{config.out}: {_growth(source, config)}")
    with Reading("import", size((source,))) as bar:
        hf.write(
            bar.watched(observe(_ending(source, tokenizer), _check_finite)),
            config.out,
            dtype=_dtype(config),
            beside=tokenizer.save if tokenizer else lambda directory: None,
        )

    _say(f"{len(source.tensors)} tensors, all numbers finite; {remark}")
    if tokenizer:
        _say_template(source, config)

    print(config.out)


def _opened(config: Config) -> StoredModel:
    return open_model(config.path, base=config.base, dtype=_dtype(config))


def _dtype(config: Config) -> torch.dtype | None:
    return DTYPES[config.dtype] if config.dtype else None


def _tokenizer(source: StoredModel, config: Config) -> tuple[Tokenizer | None, str]:
    """The tokenizer given or found, and what is to be said of it; None if there is neither.

    UserError if it has more pieces than the model. If it has fewer, it is padded: there is a name
    for each id.
    """
    place = _place(source, config)
    if place is None:
        return None, (
            f"no tokenizer came with it: it can be neither trained nor talked to before its {hf.TOKENIZER} "
            f"lies in {config.out} (or import it again with --tokenizer FILE){_candidates(source)}"
        )

    size = source.config.vocab_size
    tokenizer = Tokenizer.load(place, size)
    tokenizer.require_bos(source.path, source.config.bos_token_id)
    count = tokenizer.vocab_size

    if count > size:
        raise UserError(
            f"{place}: the tokenizer has {count:,} pieces, the model a vocabulary of {size:,}",
            "give the model's own: --tokenizer tokenizer.model",
        )

    tokenizer = (
        tokenizer
        if count == size
        else Tokenizer(sentencepiece_model.pad(tokenizer.model, count, size), str(place))
    )
    tokenizer = tokenizer.with_chat_template(
        CHAT_TEMPLATE if config.chat_template else source.template, source.config.stops
    )
    special = [
        name
        for name, token in tokenizer.controls.items()
        if token not in (tokenizer.bos, tokenizer.eos)
    ]
    control = (
        f", of which no text spells {', '.join(ascii(name) for name in special[:4])}"
        f"{', ...' if len(special) > 4 else ''}"
        if special
        else ""
    )

    return (
        tokenizer,
        f"the tokenizer has {count:,} pieces, as the model{control}"
        if count == size
        else (
            f"the tokenizer has {count:,} pieces{control}, the model {size:,}: the other {size - count:,} are padding now, "
            "which no text spells"
        ),
    )


def _place(source: StoredModel, config: Config) -> Path | StoredTokenizer | None:
    """Where the tokenizer is: what was given, or what came with the checkpoint."""
    given = config.tokenizer
    if given is not None:
        of_llama2c = given.suffix == ".bin" and given.is_file()
        return (
            llama2c_vocabulary.open_tokenizer(given, source.config.vocab_size)
            if of_llama2c
            else given
        )

    if source.path.is_dir() and str(source.tokenizer) == str(source.path / hf.TOKENIZER):
        return source.path  # where it is held against the tokenizer.json beside it

    return source.tokenizer


def _candidates(source: StoredModel) -> str:
    """Files beside a model that look like its tokenizer under another name."""
    beside = source.path if source.path.is_dir() else source.path.parent
    others = (chat_settings.SETTINGS, chat_settings.SPECIAL, chat_settings.ADDED, source.path.name)
    found = sorted(
        file.name
        for file in beside.glob("*tok*")
        if file.suffix in (".model", ".bin", ".json") and file.name not in others
    )

    return f"; it may be {' or '.join(str(beside / name) for name in found[:3])}" if found else ""


def _ending(source: StoredModel, tokenizer: Tokenizer | None) -> StoredModel:
    """The same checkpoint, whose answers end at the tokenizer's EOS besides the ids that it names
    itself."""
    if tokenizer is None or tokenizer.eos in source.config.stops:
        return source

    return replace(
        source, config=replace(source.config, eos_token_id=(*source.config.stops, tokenizer.eos))
    )


def _say_template(source: StoredModel, config: Config) -> None:
    """What became of the chat template, and what that means."""
    if config.chat_template:
        had = (
            "it had none"
            if source.template is None
            else f"the model's was {describe_template(source.template)}"
        )
        _say(f"its chat template is Llama 2's, as asked; {had}")
    elif not is_llama_2(source.template):
        kept = (
            "no chat template came with it"
            if source.template is None
            else (f"its chat template is {describe_template(source.template)}, and is kept")
        )
        _say(
            f"{kept}: it can be trained, and talked to after sft (or at once, if it was tuned for Llama 2's format: "
            "import it with --chat-template llama2)"
        )


def _described(source: StoredModel) -> str:
    shape, kinds = source.config, {stored.dtype for stored in source.tensors.values()}
    stored = ", ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds))
    count = sum(stored.numel for stored in source.tensors.values())
    kind = "reward" if source.scorer else "language"

    return (
        f"{source.format}, a {kind} model of {count:,} parameters in {stored}: "
        f"{shape.num_hidden_layers} layers of width {shape.hidden_size:,}, {shape.num_attention_heads} heads, "
        f"{shape.num_key_value_heads} for keys and values, context {shape.max_position_embeddings:,}, "
        f"vocabulary {shape.vocab_size:,}"
    )


def _size(source: StoredModel, config: Config) -> int:
    """Bytes that the weights will take."""
    return sum(
        stored.numel * (_dtype(config) or stored.dtype).itemsize
        for stored in source.tensors.values()
    )


def _growth(source: StoredModel, config: Config) -> str:
    """How much is written, and the flag for less where it is more than was there."""
    written, there = _size(source, config), _taken(source.path)
    said = f"the weights take {_gigabytes(written)}"
    if there is None or written < 1.25 * there or config.dtype is not None:
        return said

    halved = sum(stored.numel for stored in source.tensors.values()) * 2
    return f"{said}, in {source.path} {_gigabytes(there)}; --dtype bf16 takes {_gigabytes(halved)}"


def _taken(path: Path) -> int | None:
    """Bytes of one file that holds a whole model; of a directory None: it stores numbers as they
    will be written."""
    return path.stat().st_size if path.is_file() else None


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def _check_finite(stored: StoredTensor, tensor: Tensor) -> None:
    if not is_finite(tensor):
        raise UserError(
            f"{stored.place} has numbers that are infinite or undefined",
            "the file is damaged, or the model had diverged: fetch it again",
        )


def _say(line: str) -> None:
    say(f"llama2: {line}")
