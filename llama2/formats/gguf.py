"""GGUF, the format of llama.cpp and what is built on it (Ollama, LM Studio): one file with weights
and tokenizer.

Queries and keys are stored in llama.cpp's order, where rotary pairs are neighbours. Which tensor
has which type follows llama.cpp's converter and quantizer:

- Norms stay fp32, whatever the precision.
- Every other tensor has the type asked for, the embeddings too. With q4_0 the output matrix is
Q8_0, as are embeddings
  that serve as one (llama.cpp puts Q6_K there, which the library cannot write).
- Blocks of Q8_0 and Q4_0 are 32 numbers of a row: a matrix whose rows do not divide by 32 is stored
as F16.

The reader takes these types and whatever else the library can dequantize (llama.cpp's K-quants
among them).
"""

from __future__ import annotations

import functools
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from llama2.errors import UserError, missing_extra
from llama2.formats.binary import FETCH_AGAIN, read_array, replacing
from llama2.formats.gguf_header import ALIGNMENT, Entry, Header, read_header
from llama2.formats.stored_model import StoredModel, StoredTensor
from llama2.model.llama import LlamaConfig
from llama2.model.tensors import EMBEDDINGS, HEAD, NORM, halved, interleaved, rotary_heads, shapes
from llama2.terminal_text import say_once
from llama2.tokenizer import sentencepiece_model
from llama2.tokenizer.sentencepiece_model import StoredTokenizer, Vocabulary, VocabularyItem

Precision = Literal["f32", "f16", "bf16", "q8_0", "q4_0"]
_BLOCK = 32
_CHUNK = 1 << 22  # numbers that are converted at a time
_FILE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 7, "bf16": 32}
# scales of blocks are numbers of fp16
_LARGEST = {"f16": 65504.0, "q8_0": 65504.0 * 127, "q4_0": 65504.0 * 8}
_QUANTIZATION_VERSION = 2
_PAD_SCORE = -1000.0
_BYTE = re.compile("<0x[0-9A-F]{2}>")

_OUTSIDE = {EMBEDDINGS: "token_embd.weight", NORM: "output_norm.weight", HEAD: "output.weight"}
_INSIDE = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_CONFIG = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
}
_DEFAULTS = {"rope_theta": 10000.0}
FORMAT = "gguf"
# each ends an answer in llama.cpp
ENDS = tuple(f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))
_FACTORS = "rope_freqs.weight"  # by which rotary frequencies are divided
_WITHOUT_EFFECT = {
    "vocab_size",
    "attention.layer_norm_epsilon",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
    "pooling_type",
    "tensor_data_layout",
}
"""of keys of the architecture: what repeats a size, belongs to kinds that are refused, or describes
the file"""


def _library() -> ModuleType:
    try:
        import gguf
        import gguf.quants
    except ImportError:
        raise missing_extra("gguf", "release") from None

    logging.getLogger("gguf").setLevel(logging.ERROR)
    return gguf


def _their_name(name: str) -> str:
    if name in _OUTSIDE:
        return _OUTSIDE[name]

    _, _, layer, rest = name.split(".", 3)  # model.layers.N.<rest>
    return f"blk.{layer}.{_INSIDE[rest.removesuffix('.weight')]}.weight"


# ---- writing
# --------------------------------------------------------------------------------------------------------
def write(
    source: StoredModel,
    file: Path,
    *,
    precision: Precision = "f16",
    chat_template: str | None = None,
    name: str | None = None,
) -> list[str]:
    """Write a language model as one GGUF file, in which one tensor at a time is in memory.

    The same arguments give the same bytes. `chat_template` is Jinja; `name` is shown by programs
    that list models. Returns, in sentences for the user, where the file differs from what was asked
    for. UserError for a reward model, a checkpoint without a tokenizer, and weights that are too
    large for the precision or not finite.
    """
    library = _library()
    if precision not in get_args(Precision):
        raise UserError(
            f"precision '{precision}' is unknown", f"choose one of {', '.join(get_args(Precision))}"
        )
    if source.scorer:
        raise UserError(
            f"{source.path}: this is a reward model, and GGUF has no place for its head",
            "export it in Hugging Face's format, or export a language model",
        )
    if source.tokenizer is None:
        raise UserError(
            f"{source.path}: there is no tokenizer, which is a part of a GGUF file",
            "put tokenizer.model beside the weights",
        )

    vocabulary = sentencepiece_model.load(source.tokenizer)
    types = {
        tensor: _type(tensor, stored, precision, source.config)
        for tensor, stored in source.tensors.items()
    }
    with replacing(file) as stream:
        writer = library.GGUFWriter(stream.name, "llama")
        try:
            _describe(writer, source, precision, name)
            _describe_tokenizer(writer, source, vocabulary)
            if chat_template:
                writer.add_chat_template(chat_template)

            for tensor in _ordered(source):
                shape, kind = (
                    source.tensors[tensor].shape,
                    library.GGMLQuantizationType[types[tensor].upper()],
                )
                block, size = library.GGML_QUANT_SIZES[kind]
                writer.add_tensor_info(
                    _their_name(tensor),
                    shape,
                    np.dtype("float32"),
                    math.prod(shape) // block * size,
                    raw_dtype=kind,
                )

            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
        finally:
            writer.close()

        stream.seek(0, 2)
        for tensor in _ordered(source):
            stream.write(bytes(-stream.tell() % ALIGNMENT))
            for part in _converted(tensor, source, types[tensor]):
                stream.write(part)

        stream.write(bytes(-stream.tell() % ALIGNMENT))

    return _notes(types, vocabulary, precision) + _unnamed(source.config)


def _ordered(source: StoredModel) -> Iterator[str]:
    return (name for name in shapes(source.config) if name in source.tensors)


def _type(name: str, stored: StoredTensor, precision: Precision, config: LlamaConfig) -> Precision:
    if len(stored.shape) == 1:
        return "f32"
    if precision not in ("q8_0", "q4_0"):
        return precision
    if stored.shape[-1] % _BLOCK:
        return "f16"

    return "q8_0" if name == (EMBEDDINGS if config.tie_word_embeddings else HEAD) else precision


def _notes(
    types: Mapping[str, Precision], vocabulary: Vocabulary, precision: Precision
) -> list[str]:
    notes = []
    if precision in ("q8_0", "q4_0"):
        wider = sorted({name.split(".")[-2] for name, kind in types.items() if kind == "f16"})
        if wider:
            notes.append(
                f"{', '.join(wider)}: stored as f16, because their rows do not divide into blocks of {_BLOCK}"
            )

    return notes + vocabulary.describe_losses("llama.cpp")


def _unnamed(config: LlamaConfig) -> list[str]:
    more = config.stops[len(ENDS) :]
    return (
        [
            f"answers end at {len(config.stops)} ids, and GGUF has places for {len(ENDS)}: "
            f"{', '.join(map(str, more))} left out"
        ]
        if more
        else []
    )


def _describe(writer: Any, source: StoredModel, precision: Precision, name: str | None) -> None:
    config = source.config
    writer.add_type("model")
    if name:
        writer.add_name(name)

    writer.add_file_type(_FILE_TYPES[precision])
    writer.add_quantization_version(_QUANTIZATION_VERSION)
    writer.add_vocab_size(config.vocab_size)

    for field, key in _CONFIG.items():
        value = getattr(config, field)
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add(f"llama.{key}", value)

    writer.add_rope_dimension_count(config.head_dim)


def _describe_tokenizer(writer: Any, source: StoredModel, vocabulary: Vocabulary) -> None:
    items, size = list(vocabulary.items), source.config.vocab_size
    if len(items) > size:
        raise UserError(
            f"{source.tokenizer}: the tokenizer has {len(items)} pieces, the model {size}",
            "put the tokenizer there with which the model was trained",
        )

    items += [
        VocabularyItem(f"[PAD{token}]", _PAD_SCORE, sentencepiece_model.UNUSED)
        for token in range(len(items), size)
    ]
    unknown = next(
        (token for token, item in enumerate(items) if item.kind == sentencepiece_model.UNKNOWN), 0
    )
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([item.text.encode() for item in items])
    writer.add_token_scores([item.score for item in items])
    writer.add_token_types([item.kind for item in items])
    writer.add_bos_token_id(source.config.bos_token_id)

    for key, token in zip(ENDS, source.config.stops):
        writer.add_uint32(key, token)

    writer.add_unk_token_id(unknown)
    writer.add_pad_token_id(unknown)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(vocabulary.dummy_prefix)
    writer.add_bool("tokenizer.ggml.remove_extra_whitespaces", vocabulary.extra_spaces_removed)


def _converted(name: str, source: StoredModel, kind: Precision) -> Iterator[bytes]:
    """The bytes of a tensor in a type, some rows at a time."""
    stored = source.tensors[name]
    tensor = stored.read()
    if heads := rotary_heads(name, source.config):
        tensor = interleaved(tensor, heads)

    rows = tensor.view(-1, tensor.shape[-1])
    step = max(1, _CHUNK // tensor.shape[-1])
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        if kind in _LARGEST and not part.abs().max() <= _LARGEST[kind]:
            raise UserError(
                f"{stored.place}: it has values that are not finite or too large for {kind}",
                "choose bf16 or f32"
                if bool(part.isfinite().all())
                else "these weights are damaged",
            )

        yield _encode(part, kind).tobytes()


def _encode(part: Tensor, kind: Precision) -> np.ndarray[Any, Any]:
    if kind == "bf16":
        return part.to(torch.bfloat16).view(torch.int16).numpy()
    if kind in ("f32", "f16"):
        return part.to(torch.float32 if kind == "f32" else torch.float16).numpy()

    library = _library()
    found: np.ndarray[Any, Any] = library.quants.quantize(
        part.float().numpy(), library.GGMLQuantizationType[kind.upper()]
    )
    return found


# ---- reading
# --------------------------------------------------------------------------------------------------------
def read(path: Path) -> StoredModel:
    """A GGUF file as a `StoredModel`: tensors of fp32, fp16 and bf16 as they are, quantized ones
    dequantized to fp32.

    The tokenizer inside becomes a SentencePiece model when it is asked for, so a faulty one can be
    replaced. UserError for another architecture, a type that cannot be read, missing, unknown or
    wrongly shaped tensors, and a truncated or damaged file.
    """
    library = _library()
    header = read_header(path)
    config = _config(path, header)
    expected = {name: (_their_name(name), shape) for name, shape in shapes(config).items()}
    _check_names(path, header, {theirs for theirs, _ in expected.values()})
    _refuse_factors(library, path, header, config)
    tensors = {}

    for name, (theirs, shape) in expected.items():
        entry = header.tensors[theirs]
        if entry.shape != shape:
            raise UserError(
                f"{path}: tensor '{theirs}' has shape {list(entry.shape)}, its metadata asks for "
                f"{list(shape)}",
                FETCH_AGAIN,
            )

        tensors[name] = _stored(library, path, header, theirs, entry, rotary_heads(name, config))

    template = header.metadata.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise UserError(f"{path}: tokenizer.chat_template is no text", FETCH_AGAIN)

    return StoredModel(
        path, FORMAT, config, False, tensors, _tokenizer(path, header, config), template or None
    )


def _config(path: Path, header: Header) -> LlamaConfig:
    metadata = header.metadata
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise UserError(
            f"{path}: the architecture is {architecture!r}, not 'llama'",
            "only models of the Llama 2 family can be read",
        )
    if metadata.get("split.count", 1) not in (0, 1):  # 0 where llama.cpp has joined the parts
        raise UserError(
            f"{path}: one of {metadata['split.count']} parts of a model",
            "join them with llama.cpp's llama-gguf-split --merge",
        )

    values: dict[str, Any] = {}
    for field, key in _CONFIG.items():
        fallback = (
            values.get("num_attention_heads")
            if field == "num_key_value_heads"
            else _DEFAULTS.get(field)
        )
        values[field] = _number(
            path,
            metadata,
            f"llama.{key}",
            fallback,
            whole=field not in ("rms_norm_eps", "rope_theta"),
        )

    if values["num_hidden_layers"] > len(header.tensors):
        raise UserError(
            f"{path}: llama.block_count is {values['num_hidden_layers']}, but there are only "
            f"{len(header.tensors)} tensors",
            FETCH_AGAIN,
        )

    embeddings = header.tensors.get("token_embd.weight")
    if embeddings is None or len(embeddings.shape) != 2:
        raise UserError(f"{path}: tensor 'token_embd.weight' is missing or no matrix", FETCH_AGAIN)

    values["vocab_size"] = embeddings.shape[0]
    values["bos_token_id"] = _number(
        path, metadata, "tokenizer.ggml.bos_token_id", LlamaConfig.bos_token_id
    )
    ends = [_number(path, metadata, key, None) for key in ENDS if key in metadata]
    values["eos_token_id"] = tuple(ends) or LlamaConfig.eos_token_id

    try:
        config = LlamaConfig(**values, tie_word_embeddings="output.weight" not in header.tensors)
    except UserError as error:
        raise UserError(f"{path}: {error.cause}", error.cure) from None

    _refuse_variants(path, metadata, config)
    return config


def _number(
    path: Path, metadata: Mapping[str, Any], key: str, fallback: float | None, whole: bool = True
) -> Any:
    value = metadata.get(key, fallback)
    if value is None:
        raise UserError(f"{path}: the metadata '{key}' is missing", FETCH_AGAIN)

    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        shown = "different numbers" if isinstance(value, list) else repr(value)
        raise UserError(
            f"{path}: {key} is {shown}, a number was expected", "this model cannot be read"
        )

    return value if whole else _as_written(value)


def _as_written(value: float) -> float:
    """1e-05 for the fp32 number nearest to it."""
    return float(str(np.float32(value)))


def _refuse_variants(path: Path, metadata: Mapping[str, Any], config: LlamaConfig) -> None:
    """What later members of the architecture have and Llama 2 has not; 0 switches a factor off in
    llama.cpp."""
    head, off = (config.head_dim,), (1, 0)
    plain: dict[str, tuple[Any, ...]] = {
        "rope.dimension_count": head,
        "attention.key_length": head,
        "attention.value_length": head,
        "rope.scaling.type": ("none", "linear"),
        "rope.scaling.factor": off,
        "rope.scale_linear": off,
        "rope.scaling.attn_factor": off,
        "rope.scaling.yarn_attn_factor": off,
        "rope.scaling.yarn_ext_factor": (0, -1),
        "rope.scaling.yarn_log_multiplier": (0,),
        "attention.causal": (True,),
        "attention.scale": (config.head_dim**-0.5, 0),
        "logit_scale": off,
        "residual_scale": off,
        "embedding_scale": off,
        "expert_count": (0,),
        "expert_used_count": (0, 1),
    }
    known = {*_CONFIG.values(), *_WITHOUT_EFFECT}

    for name, found in metadata.items():
        key = name.removeprefix("llama.")
        if key == name or key in known:
            continue
        if (
            key == "attention.sliding_window"
            and isinstance(found, int)
            and found >= config.max_position_embeddings
        ):
            continue

        if not any(_is(found, value) for value in plain.get(key, (False, 0, ""))):
            has = (
                f", Llama 2 has {plain[key][0]!r}"
                if key in plain
                else ", a key that Llama 2 does not have"
            )
            shown = _as_written(found) if isinstance(found, float) else repr(found)[:60]
            raise UserError(f"{path}: {name} is {shown}{has}", "this model cannot be read")


def _is(found: Any, value: Any) -> bool:
    """Equality in which true is no number and numbers have the precision of fp32."""
    if isinstance(found, bool) != isinstance(value, bool):
        return False

    return (
        bool(np.float32(found) == np.float32(value))
        if isinstance(found, float) and value != ""
        else found == value
    )


def _refuse_factors(library: ModuleType, path: Path, header: Header, config: LlamaConfig) -> None:
    """Factors of rotary frequencies are how llama.cpp keeps scaled positions; factors of 1 scale
    nothing."""
    entry = header.tensors.get(_FACTORS)
    if entry is None:
        return
    if entry.shape != (config.head_dim // 2,):
        raise UserError(
            f"{path}: {_FACTORS} has shape {list(entry.shape)}, not one factor for each of "
            f"{config.head_dim // 2} frequencies",
            FETCH_AGAIN,
        )
    if not bool((_stored(library, path, header, _FACTORS, entry, None).read() == 1).all()):
        raise UserError(
            f"{path}: {_FACTORS} scales rotary positions, which Llama 2 does not",
            "this model cannot be read",
        )


def _check_names(path: Path, header: Header, expected: set[str]) -> None:
    for words, names in (
        ("missing", expected - header.tensors.keys()),
        ("unknown to Llama 2", header.tensors.keys() - expected - {_FACTORS}),
    ):
        if names:
            shown = ", ".join(sorted(names)[:4]) + (", ..." if len(names) > 4 else "")
            raise UserError(
                f"{path}: {len(names)} tensors are {words}: {shown}",
                "the file is incomplete, or of another model",
            )


def _stored(
    library: ModuleType, path: Path, header: Header, name: str, entry: Entry, heads: int | None
) -> StoredTensor:
    place = f"{path}: {name}"
    try:
        kind = library.GGMLQuantizationType(entry.kind)
    except ValueError:
        raise UserError(
            f"{place}: the type {entry.kind} is unknown", "a newer gguf library may know it"
        ) from None

    block, size = library.GGML_QUANT_SIZES[kind]
    if entry.shape[-1] % block:
        raise UserError(
            f"{place}: rows of {entry.shape[-1]} do not divide into blocks of {block}", FETCH_AGAIN
        )

    count = math.prod(entry.shape) // block * size
    if entry.offset + count > header.size:
        raise UserError(
            f"{place}: truncated: the file ends at byte {header.size}, the tensor at "
            f"{entry.offset + count}",
            FETCH_AGAIN,
        )

    plain = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}.get(kind.name)
    if plain is None and not _can_dequantize(library, kind):
        raise UserError(
            f"{place}: the library gguf cannot read the type {kind.name}",
            "export it as F16 or Q8_0",
        )

    def load() -> Tensor:
        data = read_array(path, place, "u1", entry.offset, count)
        tensor = (
            torch.from_numpy(data).view(plain)
            if plain
            else _dequantized(library, data, kind, entry.shape)
        )
        tensor = tensor.view(entry.shape)

        return halved(tensor, heads) if heads else tensor

    return StoredTensor(entry.shape, plain or torch.float32, load, place)


def _dequantized(
    library: ModuleType, data: np.ndarray[Any, Any], kind: Any, shape: tuple[int, ...]
) -> Tensor:
    out = torch.empty(shape)
    rows = data.reshape(shape[0] if len(shape) > 1 else 1, -1)
    step = max(1, _CHUNK // shape[-1])

    for start in range(0, len(rows), step):
        found = library.quants.dequantize(rows[start : start + step], kind)
        out.view(len(rows), -1)[start : start + step] = torch.from_numpy(found)

    return out


@functools.cache
def _can_dequantize(library: ModuleType, kind: Any) -> bool:
    dequantize: Callable[..., Any] = library.quants.dequantize
    try:
        dequantize(np.zeros((1, library.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False

    return True


def _tokenizer(path: Path, header: Header, config: LlamaConfig) -> StoredTokenizer | None:
    """The vocabulary in the metadata as a SentencePiece model; None if there is none."""
    if "tokenizer.ggml.model" not in header.metadata:
        return None

    return StoredTokenizer(
        str(path), functools.cache(lambda: _vocabulary(path, header.metadata, config))
    )


def _vocabulary(path: Path, metadata: Mapping[str, Any], config: LlamaConfig) -> bytes:
    kind = metadata["tokenizer.ggml.model"]
    if kind != "llama":
        what = " (byte-level BPE, as Llama 3 has)" if kind == "gpt2" else ""
        raise UserError(
            f"{path}: its tokenizer is of the kind {kind!r}{what}; only those of Llama 2's kind ('llama': "
            "SentencePiece BPE) can be read",
            "take a model of the Llama 2 family; if this is one, give "
            "its tokenizer.model: --tokenizer FILE",
        )

    try:
        items = _items(path, metadata, config)
        sentencepiece_model.check_items(
            items, str(path), f"{FETCH_AGAIN}, or give a tokenizer: --tokenizer FILE"
        )
        vocabulary = Vocabulary(
            items,
            bool(metadata.get("tokenizer.ggml.add_space_prefix", True)),
            bool(metadata.get("tokenizer.ggml.remove_extra_whitespaces", False)),
        )
        unknown = int(metadata.get("tokenizer.ggml.unknown_token_id", 0))

        # BOS 1 and EOS 2: what else ends answers is the config's
        return sentencepiece_model.build(vocabulary, unknown=unknown)
    except (AttributeError, IndexError, TypeError, ValueError):
        raise UserError(
            f"{path}: the tokenizer in its metadata is damaged",
            f"{FETCH_AGAIN}, or give one: --tokenizer FILE",
        ) from None


def _items(path: Path, metadata: Mapping[str, Any], config: LlamaConfig) -> list[VocabularyItem]:
    """The items; where scores or kinds are not told, as llama.cpp has it: 0, and plain but for the
    special ones."""
    texts = metadata.get("tokenizer.ggml.tokens")
    count = config.vocab_size
    scores = metadata.get("tokenizer.ggml.scores", [0.0] * count)
    special = {
        int(metadata.get("tokenizer.ggml.unknown_token_id", 0)): sentencepiece_model.UNKNOWN,
        **dict.fromkeys((config.bos_token_id, *config.stops), sentencepiece_model.CONTROL),
    }
    kinds = metadata.get(
        "tokenizer.ggml.token_type",
        [
            special.get(
                token,
                sentencepiece_model.BYTE if _BYTE.fullmatch(text) else sentencepiece_model.NORMAL,
            )
            for token, text in enumerate(texts if isinstance(texts, list) else [])
        ],
    )

    if not all(
        isinstance(column, list) and len(column) == count for column in (texts, scores, kinds)
    ):
        raise UserError(
            f"{path}: tokenizer.ggml.tokens, .scores and .token_type do not all have {count} "
            "items, as the embeddings have",
            f"{FETCH_AGAIN}, or give a tokenizer: --tokenizer FILE",
        )

    if "tokenizer.ggml.scores" not in metadata:
        say_once(
            f"note: {path}: its tokenizer has no scores (tokenizer.ggml.scores), so texts get other tokens than "
            "the model was trained on, here and in llama.cpp, unless you give its own: --tokenizer FILE"
        )

    return [
        VocabularyItem(text, float(score), int(kind))
        for text, score, kind in zip(texts or [], scores, kinds)
    ]
