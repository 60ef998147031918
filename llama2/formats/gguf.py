"""Read and write GGUF: weights and tokenizer in one file, for llama.cpp and programs built on it.

Queries and keys are stored in llama.cpp's order, where rotary pairs are neighbours. The types of
tensors follow llama.cpp's converter and quantizer:

- Norms stay fp32, whatever the precision.
- Every other tensor has the type asked for, the embeddings too. With q4_0 the output matrix is
  Q8_0, as are embeddings that serve as one (llama.cpp puts Q6_K there, which the library cannot
  write).
- Blocks of Q8_0 and Q4_0 are 32 numbers of a row: a matrix whose rows do not divide by 32 is stored
  as F16.

The reader takes these types and whatever else the library can dequantize (llama.cpp's K-quants
among them).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from llama2.errors import UserError
from llama2.formats import gguf_metadata, gguf_rope, gguf_vocabulary
from llama2.formats.binary import FETCH_AGAIN, replace_file
from llama2.formats.gguf_header import ALIGNMENT, Header, read_header
from llama2.formats.gguf_metadata import LLAMA, Precision, find_architecture
from llama2.formats.gguf_rope import FACTORS
from llama2.formats.gguf_tensors import (
    PLAIN,
    count_bytes,
    import_library,
    list_quantized,
    open_tensor,
)
from llama2.formats.hf_directory import check_shapes
from llama2.formats.stored_model import (
    Kinds,
    StoredModel,
    StoredTensor,
    choose_dtype,
    join_rotary_pairs,
    require_language_model,
    split_rotary_pairs,
)
from llama2.model.config import LlamaConfig
from llama2.model.tensors import EMBEDDINGS, HEAD, NORM, shapes

FORMAT = "gguf"
_BLOCK = 32
_CHUNK = 1 << 22  # numbers that are converted at a time
# scales of blocks are numbers of fp16
_LARGEST = {"f16": 65504.0, "q8_0": 65504.0 * 127, "q4_0": 65504.0 * 8}

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


def _translate(name: str) -> str:
    """Return llama.cpp's name of a tensor."""
    if name in _OUTSIDE:
        return _OUTSIDE[name]

    _, _, layer, rest = name.split(".", 3)  # model.layers.N.<rest>
    part, _, leaf = rest.rpartition(".")
    return f"blk.{layer}.{_INSIDE[part]}.{leaf}"


# --- writing ---
def write(
    model: StoredModel,
    file: Path,
    *,
    precision: Precision = "f16",
    chat_template: str | None = None,
    name: str | None = None,
) -> list[str]:
    """Write a language model as one GGUF file, in which one tensor at a time is in memory.

    The same arguments give the same bytes. `chat_template` is Jinja; programs that list models show
    `name`. Return, in sentences for the user, the differences from the model. UserError for a
    reward model, a checkpoint without a tokenizer, and weights that are too large for the precision
    or not finite.
    """
    library = import_library()
    if precision not in get_args(Precision):
        raise UserError(
            f"precision '{precision}' is unknown", f"choose one of {', '.join(get_args(Precision))}"
        )

    require_language_model(model, "GGUF")
    gguf_rope.require_holdable(model.path, model.config)
    factors = gguf_rope.make_factors(model.config)
    tokenizer = gguf_vocabulary.read_content(model)
    names = [tensor for tensor in shapes(model.config) if tensor in model.tensors]
    types = {tensor: _choose_type(tensor, model, precision) for tensor in names}
    with replace_file(file) as stream:
        writer = library.GGUFWriter(stream.name, LLAMA)
        try:
            gguf_metadata.describe_config(writer, model.config, precision, name)
            gguf_vocabulary.describe_tokenizer(writer, model, tokenizer)
            if chat_template:
                writer.add_chat_template(chat_template)

            _describe_tensors(library, writer, model, types, factors)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
        finally:
            writer.close()

        stream.seek(0, 2)
        stream.write(bytes(-stream.tell() % ALIGNMENT))
        if factors is not None:
            stream.write(factors.numpy().tobytes())

        for tensor, kind in types.items():
            stream.write(bytes(-stream.tell() % ALIGNMENT))
            for part in _convert(tensor, model, kind):
                stream.write(part)

        stream.write(bytes(-stream.tell() % ALIGNMENT))

    return [
        *_describe_wider(types, precision),
        *gguf_vocabulary.describe_losses(tokenizer),
        *gguf_metadata.describe_losses(model.config),
    ]


def _describe_tensors(
    library: ModuleType,
    writer: Any,
    model: StoredModel,
    types: Mapping[str, Precision],
    factors: Tensor | None,
) -> None:
    if factors is not None:
        writer.add_tensor_info(FACTORS, factors.shape, np.dtype("float32"), factors.nbytes)

    for name, kind in types.items():
        raw, shape = library.GGMLQuantizationType[kind.upper()], model.tensors[name].shape
        size = count_bytes(library, shape, raw)
        writer.add_tensor_info(_translate(name), shape, np.dtype("float32"), size, raw_dtype=raw)


def _choose_type(name: str, model: StoredModel, precision: Precision) -> Precision:
    shape = model.tensors[name].shape
    if len(shape) == 1:
        return "f32"
    if precision not in ("q8_0", "q4_0"):
        return precision
    if shape[-1] % _BLOCK:
        return "f16"

    output = EMBEDDINGS if model.config.tie_word_embeddings else HEAD
    return "q8_0" if name == output else precision


def _describe_wider(types: Mapping[str, Precision], precision: Precision) -> list[str]:
    if precision not in ("q8_0", "q4_0"):
        return []

    wider = sorted({name.split(".")[-2] for name, kind in types.items() if kind == "f16"})
    reason = f"stored as f16, because their rows do not divide into blocks of {_BLOCK}"
    return [f"{', '.join(wider)}: {reason}"] if wider else []


def _convert(name: str, model: StoredModel, kind: Precision) -> Iterator[bytes]:
    """Yield the bytes of a tensor in a type, some rows at a time."""
    stored = model.tensors[name]
    tensor = join_rotary_pairs(name, stored.read(), model.config)
    rows = tensor.view(-1, tensor.shape[-1])
    step = max(1, _CHUNK // tensor.shape[-1])

    for part in torch.split(rows, step):
        if kind in _LARGEST and not part.abs().max() <= _LARGEST[kind]:
            raise UserError(
                f"{stored.place}: it has values that are not finite or too large for {kind}",
                "choose bf16 or f32" if part.isfinite().all() else "these weights are damaged",
            )

        yield _encode(part, kind).tobytes()


def _encode(part: Tensor, kind: Precision) -> np.ndarray[Any, Any]:
    if kind == "bf16":
        return part.to(torch.bfloat16).view(torch.int16).numpy()
    if kind in ("f32", "f16"):
        return part.to(PLAIN[kind.upper()]).numpy()

    library = import_library()
    raw = library.GGMLQuantizationType[kind.upper()]
    return np.asarray(library.quants.quantize(part.float().numpy(), raw))


# --- reading ---
def read(path: Path, dtype: Kinds = torch.float32) -> StoredModel:
    """Open a GGUF file: tensors of fp32, fp16 and bf16 as they are, others dequantized to `dtype`.

    `dtype` may be that of each tensor by its name. The tokenizer inside is built when it is read,
    so a faulty one can be replaced. UserError for another architecture, a type that cannot be read,
    missing, unknown or wrongly shaped tensors, and a truncated or damaged file.
    """
    library = import_library()
    header = read_header(path)
    config = gguf_metadata.read_config(path, header)
    if FACTORS in header.tensors:
        config = _read_factors(library, path, header, config)

    names = {name: _translate(name) for name in shapes(config)}
    wanted = {names[name]: shape for name, shape in shapes(config).items()}
    stored = {name: entry.shape for name, entry in header.tensors.items() if name != FACTORS}
    check_shapes(path, wanted, stored, "its metadata")
    pairs_joined = find_architecture(path, header.metadata) == LLAMA
    tensors: dict[str, StoredTensor] = {}
    for name, theirs in names.items():
        opened = open_tensor(library, path, header, theirs, choose_dtype(dtype, name))
        tensors[name] = split_rotary_pairs(name, opened, config) if pairs_joined else opened

    template = header.metadata.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise UserError(f"{path}: tokenizer.chat_template is no text", FETCH_AGAIN)

    return StoredModel(
        path,
        FORMAT,
        config,
        False,
        tensors,
        gguf_vocabulary.open_tokenizer(path, header, config),
        template or None,
        quantized=list_quantized(library, header),
    )


def _read_factors(
    library: ModuleType, path: Path, header: Header, config: LlamaConfig
) -> LlamaConfig:
    """Return the shape with the scaling that factors of rotary frequencies stand for."""
    check_shapes(
        path,
        {FACTORS: (config.head_dim // 2,)},
        {FACTORS: header.tensors[FACTORS].shape},
        "its metadata",
    )
    stored = open_tensor(library, path, header, FACTORS)
    original = gguf_metadata.find_original(path, header.metadata)
    scaling = gguf_rope.recognise_factors(stored.place, stored.read().float(), config, original)
    return config if scaling is None else replace(config, rope_scaling=scaling)
