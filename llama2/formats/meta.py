"""Meta's own files: `consolidated.NN.pth`, one for each model-parallel rank, and `params.json`.

Rank r of N holds its part of every matrix: of queries, keys, values, gate, up and the head their
outputs (rows) from r/N to (r+1)/N, of the two projections that write to the residual stream and of
the embeddings their inputs (columns). Norms are in every file, equal. Rows of queries and keys are
ordered so that rotary pairs are neighbours.

What the format does not hold: the context (4,096 in the paper), the ids of BOS and EOS, whether
embeddings and head are tied (both are written), and the width of the feed-forward network, which
Meta's code reckons from `multiple_of` and `ffn_dim_multiplier`; we take it from the tensors.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama2 import atomic, json_files
from llama2.errors import UserError, did_you_mean, explain_os_errors
from llama2.formats import torch_legacy, torch_zip
from llama2.formats.stored_model import StoredModel, StoredTensor
from llama2.model.llama import LlamaConfig
from llama2.model.tensors import EMBEDDINGS, HEAD, halved, interleaved, rotary_heads, shapes
from llama2.terminal_text import shown
from llama2.tokenizer import sentencepiece_model as pieces
from llama2.tokenizer.sentencepiece_model import StoredTokenizer

PARAMETERS, TOKENIZER = "params.json", "tokenizer.model"
CONTEXT = 4096
_THETA = 10000.0
ROWS, COLUMNS = 0, 1
_OUTSIDE = {
    "model.embed_tokens": ("tok_embeddings", COLUMNS),
    "model.norm": ("norm", None),
    "lm_head": ("output", ROWS),
}
_INSIDE = {
    "self_attn.q_proj": ("attention.wq", ROWS),
    "self_attn.k_proj": ("attention.wk", ROWS),
    "self_attn.v_proj": ("attention.wv", ROWS),
    "self_attn.o_proj": ("attention.wo", COLUMNS),
    "mlp.gate_proj": ("feed_forward.w1", ROWS),
    "mlp.down_proj": ("feed_forward.w2", COLUMNS),
    "mlp.up_proj": ("feed_forward.w3", ROWS),
    "input_layernorm": ("attention_norm", None),
    "post_attention_layernorm": ("ffn_norm", None),
}


def their_name(name: str) -> tuple[str, int | None]:
    """What Meta calls a tensor of ours, and the axis along which ranks share it (None: every rank
    has it whole)."""
    stem = name.removesuffix(".weight")
    if stem in _OUTSIDE:
        theirs, axis = _OUTSIDE[stem]
        return f"{theirs}.weight", axis

    _, _, layer, inside = stem.split(".", 3)  # model.layers.N.<inside>
    theirs, axis = _INSIDE[inside]
    return f"layers.{layer}.{theirs}.weight", axis


# ---- reading
# --------------------------------------------------------------------------------------------------------
def read(path: Path, *, context: int = CONTEXT) -> StoredModel:
    """A directory of Meta's, its model-parallel parts joined. `context`: the most positions, which
    no file names.

    UserError for a missing shard, shards that disagree, params.json that does not fit, a truncated
    or damaged file, and one that holds more than tensors. Norms are compared between ranks when
    they are read.
    """
    path = Path(path)
    values = _parameters(path / PARAMETERS)
    files = _files(path)
    parts = [
        {
            name: stored
            for name, stored in torch_legacy.either(file).items()
            if not name.endswith("rope.freqs")
        }
        for file in files
    ]
    config = _config(path, values, parts, context)
    _check(config, files, parts)
    tensors = {name: _joined(name, shape, parts, config) for name, shape in shapes(config).items()}
    found = (
        place
        for place in (path / TOKENIZER, path.resolve().parent / TOKENIZER)
        if os.path.lexists(place)
    )

    return StoredModel(path, "meta", config, False, tensors, next(found, None))


def _parameters(file: Path) -> dict[str, Any]:
    values = json_files.json_object(file)
    for name in ("dim", "n_layers", "n_heads"):
        if values.get(name) is None:
            raise UserError(f"{file}: the key '{name}' is missing", did_you_mean(name, values))

    for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "max_seq_len"):
        if values.get(name) is not None and type(values[name]) is not int:
            raise UserError(
                f"{file}: {name} is {shown(values[name])}", "a whole number was expected"
            )

    for name in ("norm_eps", "rope_theta"):
        value = values.get(name)
        if value is not None and (type(value) not in (int, float) or not math.isfinite(value)):
            raise UserError(f"{file}: {name} is {shown(value)}", "a finite number was expected")

    values = {name: value for name, value in values.items() if value is not None}
    if values.get("use_scaled_rope") or values.get("moe"):
        raise UserError(
            f"{file}: a later model than Llama 2", "only models of the Llama 2 family can be read"
        )

    return values


def _files(path: Path) -> list[Path]:
    numbers = {
        int(match[1]): file
        for file in path.glob("consolidated.*.pth")
        if (match := re.fullmatch(r"consolidated\.(\d+)\.pth", file.name))
    }
    if not numbers:
        raise UserError(f"{path}: there is no consolidated.00.pth", "fetch the weights")

    for number in range(max(numbers)):
        if number not in numbers:
            raise UserError(
                f"{path / f'consolidated.{number:02}.pth'}: missing, though there is "
                f"{numbers[max(numbers)].name}",
                "fetch this shard",
            )

    return [numbers[number] for number in sorted(numbers)]


def _config(
    path: Path, values: Mapping[str, Any], parts: Sequence[Mapping[str, StoredTensor]], context: int
) -> LlamaConfig:
    embeddings = _matrix(path, parts[0], "tok_embeddings.weight")
    gate = _matrix(path, parts[0], "layers.0.feed_forward.w1.weight")
    if embeddings[1] * len(parts) != values["dim"]:
        written, rest = divmod(values["dim"], embeddings[1] or values["dim"] + 1)
        lacking = (
            f"it is one of {written} shards, of which {len(parts)} are here"
            if written > 1 and not rest
            else f"{PARAMETERS} and {len(parts)} shards make it {values['dim'] / len(parts):g}"
        )
        raise UserError(
            f"{path}/consolidated.00.pth: tok_embeddings.weight has {embeddings[1]} columns: {lacking}",
            "the directory must hold the files of one model, all of them",
        )

    try:
        config = LlamaConfig(
            vocab_size=embeddings[0],
            hidden_size=values["dim"],
            intermediate_size=gate[0] * len(parts),
            num_hidden_layers=values["n_layers"],
            num_attention_heads=values["n_heads"],
            num_key_value_heads=values.get("n_kv_heads", values["n_heads"]),
            max_position_embeddings=values.get("max_seq_len", context),
            rms_norm_eps=float(values.get("norm_eps", 1e-5)),
            rope_theta=float(values.get("rope_theta", _THETA)),
        )
    except UserError as error:
        raise UserError(f"{path / PARAMETERS}: {error.cause}", error.cure) from None

    if values.get("vocab_size", -1) not in (-1, config.vocab_size):
        raise UserError(
            f"{path / PARAMETERS}: vocab_size is {values['vocab_size']}, tok_embeddings.weight has "
            f"{config.vocab_size} rows",
            "they are of different models",
        )
    if config.num_hidden_layers > len(parts[0]):
        raise UserError(
            f"{path / PARAMETERS}: n_layers is {config.num_hidden_layers}, but consolidated.00.pth has "
            f"{len(parts[0])} tensors",
            "they are of different models",
        )

    _divisible(path, config, len(parts))
    return config


def _matrix(path: Path, part: Mapping[str, StoredTensor], name: str) -> tuple[int, int]:
    shape = part[name].shape if name in part else ()
    if len(shape) != 2:
        raise UserError(
            f"{path}/consolidated.00.pth: tensor '{name}' is {'no matrix' if name in part else 'missing'}",
            "only models of the Llama 2 family can be read",
        )

    return shape[0], shape[1]


def _check(
    config: LlamaConfig, files: Sequence[Path], parts: Sequence[Mapping[str, StoredTensor]]
) -> None:
    """Every file has its part of every tensor, of the right shape and of one kind, and no other
    tensor."""
    expected = {
        theirs: _part(shape, axis, len(files))
        for name, shape in shapes(config).items()
        for theirs, axis in [their_name(name)]
    }
    for file, part in zip(files, parts):
        for words, names in (
            ("missing", expected.keys() - part.keys()),
            ("unknown", part.keys() - expected.keys()),
        ):
            if names:
                shown = ", ".join(sorted(names)[:4]) + (", ..." if len(names) > 4 else "")
                raise UserError(
                    f"{file}: {len(names)} tensors are {words}: {shown}",
                    f"the file and {PARAMETERS} are of different models, or incomplete",
                )

        for name, shape in expected.items():
            stored, first = part[name], parts[0][name]
            if stored.shape != shape:
                raise UserError(
                    f"{stored.place} is {list(stored.shape)}, {PARAMETERS} and {len(files)} shards make it "
                    f"{list(shape)}",
                    "the files are of different models",
                )
            if stored.dtype != first.dtype or not stored.dtype.is_floating_point:
                raise UserError(
                    f"{stored.place} is {stored.dtype}"
                    + (
                        f", in {files[0].name} {first.dtype}" if stored.dtype != first.dtype else ""
                    ),
                    "the same floating-point numbers are expected in every shard",
                )


def _part(shape: tuple[int, ...], axis: int | None, shards: int) -> tuple[int, ...]:
    """The shape of one rank's part."""
    return tuple(size // shards if place == axis else size for place, size in enumerate(shape))


def _joined(
    name: str,
    shape: tuple[int, ...],
    parts: Sequence[Mapping[str, StoredTensor]],
    config: LlamaConfig,
) -> StoredTensor:
    theirs, axis = their_name(name)
    pieces = [part[theirs] for part in parts]

    def load() -> Tensor:
        if axis is None:
            return _agreed(pieces)

        if len(pieces) == 1:
            whole = pieces[0].read()
        else:
            whole = torch.empty(shape, dtype=pieces[0].dtype)
            for target, piece in zip(whole.chunk(len(pieces), axis), pieces):
                target.copy_(piece.read())

        heads = rotary_heads(name, config)
        return halved(whole, heads) if heads else whole

    return StoredTensor(shape, pieces[0].dtype, load, pieces[0].place)


def _agreed(pieces: Sequence[StoredTensor]) -> Tensor:
    """A tensor of which every rank has a copy."""
    first = pieces[0].read()
    for piece in pieces[1:]:
        if not torch.equal(piece.read(), first):
            raise UserError(
                f"{piece.place} differs from that of the first shard",
                "the files are of different models",
            )

    return first


# ---- writing
# --------------------------------------------------------------------------------------------------------
def write(
    source: StoredModel, directory: Path, *, dtype: torch.dtype | None = None, shards: int = 1
) -> list[str]:
    """Write a language model as Meta's code loads it on `shards` model-parallel ranks.

    One tensor at a time is in memory, whatever the number of files. `dtype` converts the weights;
    without it each keeps its own. Returns, in sentences for the user, what Meta's code does not
    read. UserError for a reward model, a shape that does not divide into so many ranks, and a
    directory that holds something already.
    """
    directory = Path(directory)
    if source.scorer:
        raise UserError(
            f"{source.path}: this is a reward model, and Meta's format has no place for its head",
            "export it in Hugging Face's format, or export a language model",
        )

    _divisible(source.path, source.config, shards)
    names = list(shapes(source.config))
    if source.config.tie_word_embeddings:
        names.append(HEAD)

    stored = {name: source.tensors.get(name, source.tensors[EMBEDDINGS]) for name in names}
    layout = {
        theirs: (_part(stored[name].shape, axis, shards), dtype or stored[name].dtype)
        for name in names
        for theirs, axis in [their_name(name)]
    }
    with _fresh(directory) as work:
        with ExitStack() as stack:
            targets = [
                stack.enter_context(torch_zip.create(work / f"consolidated.{rank:02}.pth", layout))
                for rank in range(shards)
            ]
            for name in names:
                _deal(name, stored[name], layout[their_name(name)[0]][1], source.config, targets)

        (work / PARAMETERS).write_text(
            json.dumps(parameters(source.config), indent=2) + "\n", encoding="utf-8"
        )
        if source.tokenizer is not None:
            (work / TOKENIZER).write_bytes(_as_large(source.tokenizer, source.config.vocab_size))

    theta = source.config.rope_theta
    return (
        []
        if theta == _THETA
        else [
            f"{PARAMETERS} has rope_theta {theta:g}, which Code Llama's code reads; that of Llama 2 knows no such key and "
            f"takes {_THETA:g} for granted"
        ]
    )


def _as_large(tokenizer: Path | StoredTokenizer, size: int) -> bytes:
    """A tokenizer with an item for each row of the embeddings: Meta's code makes as many rows as it
    has items."""
    model = pieces.read_model(tokenizer)
    count = len(pieces.parse(model, str(tokenizer)).items)
    return model if count >= size else pieces.pad(model, count, size)


def _deal(
    name: str,
    stored: StoredTensor,
    dtype: torch.dtype,
    config: LlamaConfig,
    targets: Sequence[Callable[[Tensor], None]],
) -> None:
    """Give each rank's file its part of a tensor."""
    tensor = stored.read().to(dtype)
    if heads := rotary_heads(name, config):
        tensor = interleaved(tensor, heads)

    _, axis = their_name(name)
    parts = [tensor] * len(targets) if axis is None else tensor.chunk(len(targets), axis)
    for target, part in zip(targets, parts):
        target(part)


def _divisible(place: Path, config: LlamaConfig, shards: int) -> None:
    if shards < 1:
        raise UserError(f"shards is {shards}", "it must be at least 1")

    for name in (
        "num_attention_heads",
        "num_key_value_heads",
        "hidden_size",
        "intermediate_size",
        "vocab_size",
    ):
        size = getattr(config, name)
        if size % shards:
            raise UserError(
                f"{place}: {name} {size} does not divide into {shards} shards",
                "choose a number of shards that divides it",
            )


def parameters(config: LlamaConfig) -> dict[str, Any]:
    """params.json: what Meta's `ModelArgs` takes, so that its code reckons our width of the
    feed-forward network."""
    values: dict[str, Any] = {
        "dim": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "norm_eps": config.rms_norm_eps,
        "vocab_size": config.vocab_size,
        **_width(config),
    }
    if config.num_key_value_heads != config.num_attention_heads:
        values["n_kv_heads"] = config.num_key_value_heads

    if config.rope_theta != _THETA:
        values["rope_theta"] = config.rope_theta

    return values


def feed_forward_size(dim: int, multiple_of: int, multiplier: float | None) -> int:
    """The width of the feed-forward network as Meta's code reckons it: two thirds of four times the
    width of the model, times the multiplier, rounded up."""
    size = int(2 * (4 * dim) / 3)
    if multiplier is not None:
        size = int(multiplier * size)

    return multiple_of * math.ceil(size / multiple_of)


def _width(config: LlamaConfig) -> dict[str, Any]:
    """`multiple_of`, and `ffn_dim_multiplier` where it takes one, that give `intermediate_size`."""
    wanted = config.intermediate_size
    divisors = [2**power for power in range(12, -1, -1) if wanted % 2**power == 0]
    # 256 in most of the published models
    for multiple in sorted(divisors, key=lambda multiple: abs(multiple - 256)):
        if feed_forward_size(config.hidden_size, multiple, None) == wanted:
            return {"multiple_of": multiple}

    multiple, base = divisors[0], feed_forward_size(config.hidden_size, 1, None)
    # about the middle of what is rounded up to it
    exact = (wanted - (multiple - 1) / 2 + 0.25) / base
    rounded = (round(exact, digits) for digits in range(1, 17))

    return {
        "multiple_of": multiple,
        "ffn_dim_multiplier": next(
            (
                value
                for value in rounded
                if feed_forward_size(config.hidden_size, multiple, value) == wanted
            ),
            exact,
        ),
    }


@contextmanager
def _fresh(directory: Path) -> Iterator[Path]:
    """A directory to fill, which becomes `directory` when the block ends, and vanishes if it ends
    with an error."""
    work = directory.with_name(f".{directory.name}.tmp")
    with explain_os_errors(directory):
        if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
            raise UserError(
                f"{directory}: something is there already", "choose another place, or move it away"
            )

        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        try:
            yield work
            if directory.exists():
                directory.rmdir()

            atomic.flush_tree(work)
            atomic.replace(work, directory)
        finally:
            shutil.rmtree(work, ignore_errors=True)
