"""What a checkpoint directory consists of: the names of its files, config.json, the index of shards, the checksums.

It is a Hugging Face model directory. Beside the standard files stands `checksums.json` (file name -> SHA-256), written
last: a directory that has it is complete, and what was damaged later is found on reading. Its absence is no error:
other programs do not write it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from llama2 import durable
from llama2.errors import UserError, did_you_mean, explain_os_errors
from llama2.model.formats import binary
from llama2.model.llama import LlamaConfig

CONFIG, WEIGHTS, INDEX, CHECKSUMS = "config.json", "model.safetensors", "model.safetensors.index.json", "checksums.json"
PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
BESIDE = ("generation_config.json", "tokenizer.model", "tokenizer.json", "tokenizer_config.json",
          "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json")
"""what may stand beside the weights: how to generate, the tokenizer, the template of a chat"""
LANGUAGE_MODEL, SEQUENCE_SCORER = "LlamaForCausalLM", "LlamaForSequenceClassification"
SCORE = "score.weight"
PADDING = 0  # transformers finds the last real token of a row by it; the published tokenizer has no id for padding
UNFIT = "this model cannot be loaded"


# ---- config.json ----------------------------------------------------------------------------------------------------
def read_config(directory: Path) -> tuple[LlamaConfig, bool]:
    """The shape of the model in a directory, and whether it is a scorer. UserError names the key that does not fit."""
    path = directory / CONFIG
    if not directory.is_dir():
        raise UserError(f"{directory}: no such checkpoint directory", "check the path")
    if not path.exists():
        raise UserError(f"{path}: missing", f"a checkpoint directory has a {CONFIG} beside its weights")
    values = read_json(path)
    _refuse_relatives(path, values)
    required = {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"}
    for name in sorted(name for name in required if values.get(name) is None):
        raise UserError(f"{path}: the key '{name}' is missing", did_you_mean(name, values))
    known = {name: values[name] for name in LlamaConfig.__dataclass_fields__ if values.get(name) is not None}
    known.setdefault("num_key_value_heads", known["num_attention_heads"])
    known.setdefault("rope_theta", _section(path, values, "rope_parameters").get("rope_theta", 10000.0))
    if isinstance(known.get("eos_token_id"), list) and known["eos_token_id"]:
        known["eos_token_id"] = known["eos_token_id"][0]
    for name, value in known.items():
        _check_number(path, name, value)
    try:
        config = LlamaConfig(**known)
    except UserError as error:
        raise UserError(f"{path}: {error.cause}", error.cure) from None
    if values.get("head_dim") not in (None, config.head_dim):
        raise UserError(f"{path}: head_dim is {values['head_dim']}, Llama 2 has hidden_size / num_attention_heads = "
                        f"{config.head_dim}", UNFIT)
    return config, _is_scorer(path, values)


def _refuse_relatives(path: Path, values: Mapping[str, Any]) -> None:
    """UserError for another architecture, and for what Llama 2 has not: its weights might load and say nonsense."""
    if values.get("model_type") != "llama":
        raise UserError(f"{path}: model_type is '{values.get('model_type')}', not 'llama'",
                        "only models of the Llama 2 family can be loaded")
    if values.get("quantization_config"):
        method = _section(path, values, "quantization_config").get("quant_method", "unknown")
        raise UserError(f"{path}: the weights are quantized (quant_method '{method}')", "take the original weights")
    rope, scaling = _section(path, values, "rope_parameters"), _section(path, values, "rope_scaling")
    fixed = {"hidden_act": ("silu", values.get("hidden_act")), "attention_bias": (False, values.get("attention_bias")),
             "mlp_bias": (False, values.get("mlp_bias")), "rope_type": ("default", rope.get("rope_type")),
             "rope_scaling": ("default", scaling.get("rope_type", scaling.get("type")))}
    for name, (expected, found) in fixed.items():
        if found is not None and found != expected:
            raise UserError(f"{path}: {name} is {found!r}, Llama 2 has {expected!r}", UNFIT)


def _section(path: Path, values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = values.get(name) or {}
    if not isinstance(section, Mapping):
        raise UserError(f"{path}: {name} is {section!r}", "a JSON object was expected")
    return section


def _check_number(path: Path, name: str, value: Any) -> None:
    kinds: dict[str, tuple[tuple[type, ...], str]] = {
        "bool": ((bool,), "true or false was expected"), "int": ((int,), "a whole number was expected"),
        "float": ((int, float), "a number was expected")}
    allowed, wanted = kinds[str(LlamaConfig.__dataclass_fields__[name].type)]
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed) or value != value:
        raise UserError(f"{path}: {name} is {value!r}", wanted)


def _is_scorer(path: Path, values: Mapping[str, Any]) -> bool:
    listed = values.get("architectures") or [LANGUAGE_MODEL]
    known = {name.lower(): name for name in (LANGUAGE_MODEL, SEQUENCE_SCORER)}  # early conversions wrote LLaMA
    names = [known.get(str(name).lower()) for name in listed] if isinstance(listed, list) else []
    if not names or None in names:
        raise UserError(f"{path}: architectures is {listed!r}", f"{LANGUAGE_MODEL} or {SEQUENCE_SCORER} was expected")
    return SEQUENCE_SCORER in names


def config_json(config: LlamaConfig, *, scorer: bool = False, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """config.json, complete for transformers 4 and 5 (which renamed `torch_dtype` and `rope_theta`)."""
    precision = str(dtype).removeprefix("torch.")
    values: dict[str, Any] = {
        "architectures": [SEQUENCE_SCORER if scorer else LANGUAGE_MODEL],
        "model_type": "llama",
        **{name: getattr(config, name) for name in LlamaConfig.__dataclass_fields__},
        "head_dim": config.head_dim,
        "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0, "mlp_bias": False,
        "initializer_range": 0.02, "pretraining_tp": 1, "use_cache": True,
        "torch_dtype": precision, "dtype": precision,
    }
    if scorer:
        values |= {"num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "pad_token_id": PADDING}
    return values


# ---- tensors and their files ----------------------------------------------------------------------------------------
def shapes(config: LlamaConfig, *, scorer: bool = False) -> dict[str, tuple[int, ...]]:
    """Every tensor of a model of this shape, in the order of its state dict."""
    found = binary.shapes(config)
    if scorer:
        found.pop(binary.HEAD, None)
        found[SCORE] = (1, config.hidden_size)
    return found


def check_shapes(place: Path, expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]],
                 told_by: str = CONFIG) -> None:
    """Every expected tensor with its shape and no other, else one error that names them all (a few of each kind)."""
    wrong = [f"{name} {list(found[name])} instead of {list(shape)}"
             for name, shape in expected.items() if name in found and found[name] != shape]
    faults = {"missing": sorted(expected.keys() - found.keys()), "unknown": sorted(found.keys() - expected.keys()),
              "wrongly shaped": wrong}
    listed = [f"{len(names)} {kind}: {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}"
              for kind, names in faults.items() if names]
    if listed:
        raise UserError(f"{place}: the tensors do not fit {told_by}: {'; '.join(listed)}",
                        "the weights and the config are of different models, or the checkpoint is incomplete")


def weight_files(directory: Path) -> list[Path]:
    """The weight files of a directory: one, or the shards its index names; safetensors if there are both kinds."""
    for whole, index in ((WEIGHTS, INDEX), (PICKLED, PICKLED_INDEX)):
        if (directory / index).exists():
            return _shards(directory, index)
        if (directory / whole).exists():
            return [directory / whole]
    raise UserError(f"{directory}: neither {WEIGHTS} nor {INDEX} is there, nor {PICKLED}", "check the path")


def model_files(directory: Path) -> list[str]:
    """The names of all files that make up the model in a directory: what any program reads there."""
    weights = weight_files(directory)
    listed = directory / CHECKSUMS
    index = INDEX if weights[0].suffix == ".safetensors" else PICKLED_INDEX
    names = {path.name for path in weights} | {CONFIG, CHECKSUMS, index, *BESIDE}
    names |= {name for name in (read_json(listed) if listed.is_file() else {}) if Path(name).name == name}
    return sorted(name for name in names if (directory / name).is_file())


def _shards(directory: Path, index: str) -> list[Path]:
    weight_map = read_json(directory / index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{directory / index}: no weight_map", "fetch the checkpoint again")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or Path(name).name != name:
            raise UserError(f"{directory / index}: the file of '{tensor}' is {name!r}", "fetch the checkpoint again")
        if not (directory / name).exists():
            raise UserError(f"{directory / name}: missing, though {index} names it", "fetch this shard")
    return [directory / name for name in sorted(set(weight_map.values()))]


# ---- writing whole directories --------------------------------------------------------------------------------------
@contextmanager
def replacing(directory: Path) -> Iterator[Path]:
    """A place to write a checkpoint directory, which takes its name when the block ends and vanishes if it fails.

    Of a directory that exists, the files written are replaced and the weights of other names removed; others stay.
    """
    with explain_os_errors(directory):
        fresh = not directory.exists()
        work = directory.with_name(f".{directory.name}.tmp") if fresh else directory / ".tmp"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        try:
            yield work
            durable.flush_tree(work)
            if fresh:
                durable.replace(work, directory)
            else:
                _replace_files(work, directory)
        finally:
            shutil.rmtree(work, ignore_errors=True)


def _replace_files(work: Path, directory: Path) -> None:
    """Move finished files over an older checkpoint. The checksums go first and come last: a directory caught in
    between has none, and one that has them is whole."""
    (directory / CHECKSUMS).unlink(missing_ok=True)
    new = sorted((path.name for path in work.iterdir()), key=lambda name: (name == CHECKSUMS, name))
    stale = {INDEX, WEIGHTS, *(path.name for path in directory.glob("model-*-of-*.safetensors"))} - set(new)
    for name in new[:-1]:
        os.replace(work / name, directory / name)
    for name in stale:
        (directory / name).unlink(missing_ok=True)
    durable.flush(directory)
    durable.replace(work / new[-1], directory / new[-1])


def verify_checksums(directory: Path) -> None:
    """UserError if a file differs from what checksums.json says; nothing if there is none."""
    path = directory / CHECKSUMS
    if not path.exists():
        return
    for name, expected in read_json(path).items():
        if not (directory / name).exists():
            raise UserError(f"{directory / name}: missing, though {CHECKSUMS} names it", "fetch the checkpoint again")
        if sha256(directory / name) != expected:
            raise UserError(f"{directory / name}: its checksum differs from {CHECKSUMS}",
                            f"fetch it again, or delete {CHECKSUMS} if you changed the file on purpose")


def sha256(path: Path) -> str:
    """The hash of a file's content."""
    with explain_os_errors(path), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """A file that holds a JSON object."""
    with explain_os_errors(path):
        text = path.read_bytes()
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error})", "fetch it again") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: a JSON object was expected", "fetch it again")
    return values


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """A JSON object as a file."""
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
