"""A checkpoint directory *is* a Hugging Face model directory: config.json and safetensors, in shards if large.

transformers, vLLM and llama.cpp's converter read it as it is, and we read what `save_pretrained` writes. Beside the
standard files stands `checksums.json` (file name -> SHA-256), written last: a directory that has it is complete, and
what was damaged later is found on loading. Its absence is no error: other programs do not write it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from llama2.errors import UserError, did_you_mean, explain_os_errors
from llama2.model.llama import Linear, Llama, LlamaConfig, initialise
from llama2.model.scorer import Scorer

CONFIG, WEIGHTS, INDEX, CHECKSUMS = "config.json", "model.safetensors", "model.safetensors.index.json", "checksums.json"
LANGUAGE_MODEL, SEQUENCE_SCORER = "LlamaForCausalLM", "LlamaForSequenceClassification"
HEAD, SCORE, EMBEDDINGS = "lm_head.weight", "score.weight", "model.embed_tokens.weight"
PADDING = 0  # transformers finds the last real token of a row by it; the published tokenizer has no id for padding
Directory = str | os.PathLike[str]


# ---- saving ---------------------------------------------------------------------------------------------------------
def save(model: nn.Module, directory: Directory, *, dtype: torch.dtype | None = None, shard_bytes: int = 5 << 30
         ) -> None:
    """Write a `Llama` or a `Scorer` as a checkpoint directory; `dtype` converts the weights on the way.

    Weights are split into shards of at most `shard_bytes`. Other files of an existing directory stay.
    """
    if not isinstance(model, Llama | Scorer):
        raise TypeError(f"cannot save a {type(model).__name__}")
    save_tensors(model.state_dict(), model.config, directory, scorer=isinstance(model, Scorer), dtype=dtype,
                 shard_bytes=shard_bytes)


def save_tensors(tensors: Mapping[str, Tensor], config: LlamaConfig, directory: Directory, *, scorer: bool = False,
                 dtype: torch.dtype | None = None, shard_bytes: int = 5 << 30) -> None:
    """`save` for a state dict gathered elsewhere (a model whose weights are spread over ranks)."""
    directory = Path(directory)
    with explain_os_errors(directory):
        fresh = not directory.exists()
        work = directory.with_name(f".{directory.name}.tmp") if fresh else directory / ".tmp"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        try:
            _write(work, tensors, config, scorer, dtype, shard_bytes)
            if fresh:
                os.replace(work, directory)
            else:
                _replace_files(work, directory)
        finally:
            shutil.rmtree(work, ignore_errors=True)


def _write(work: Path, tensors: Mapping[str, Tensor], config: LlamaConfig, scorer: bool, dtype: torch.dtype | None,
           shard_bytes: int) -> None:
    shards = _shards(tensors, dtype, shard_bytes)
    names = [WEIGHTS] if len(shards) == 1 else [
        f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    kept = dtype or next(iter(tensors.values())).dtype
    for name, shard in zip(names, shards, strict=True):
        converted = {key: tensors[key].detach().to("cpu", kept).contiguous() for key in shard}
        try:
            save_file(converted, work / name, metadata={"format": "pt"})
        except SafetensorError as error:  # it hides the operating system's error number
            raise UserError(f"{work / name}: cannot write ({error})", "check the free space and the path") from error
        (work / name).chmod(_shared_mode())
    if len(shards) > 1:
        size = sum(tensor.numel() for tensor in tensors.values()) * kept.itemsize
        where = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        _write_json(work / INDEX, {"metadata": {"total_size": size}, "weight_map": dict(sorted(where.items()))})
    _write_json(work / CONFIG, config_json(config, scorer=scorer, dtype=kept))
    _write_json(work / CHECKSUMS, {path.name: _sha256(path) for path in sorted(work.iterdir())})


def _shards(tensors: Mapping[str, Tensor], dtype: torch.dtype | None, shard_bytes: int) -> list[list[str]]:
    """Tensor names in order, cut so that no shard exceeds `shard_bytes` (a larger tensor has one for itself)."""
    shards: list[list[str]] = [[]]
    used = 0
    for key, tensor in tensors.items():
        size = tensor.numel() * (dtype or tensor.dtype).itemsize
        if shards[-1] and used + size > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(key)
        used += size
    return shards


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
    os.replace(work / new[-1], directory / new[-1])


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


# ---- loading --------------------------------------------------------------------------------------------------------
def _shared_mode() -> int:
    """The mode a new file gets from this process: safetensors makes its files readable by their owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def load(directory: Directory, *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
         ) -> Llama:
    """The language model in a checkpoint directory, its weights converted to `dtype` and moved to `device`.

    Strict: every missing, unknown or wrongly shaped tensor and every damaged file is named in a `UserError`.
    """
    directory = Path(directory)
    config, values = _read_config(directory)
    if SEQUENCE_SCORER in _architectures(values):
        raise UserError(f"{directory}: this is a reward model, a language model was expected",
                        "give the directory of a model from pretrain, sft, rejection or ppo")
    with torch.device("meta"):
        model = Llama(config)
    _fill(model, directory, dtype, device)
    return model


def load_scorer(directory: Directory, *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None,
                seed: int = 0) -> Scorer:
    """A scorer: from a scorer's checkpoint, or the trunk of a language model with a fresh head drawn from `seed`."""
    directory = Path(directory)
    config, values = _read_config(directory)
    with torch.device("meta"):
        model = Scorer(config)
    fresh = SEQUENCE_SCORER not in _architectures(values)
    _fill(model, directory, dtype, device, fresh_head=fresh)
    if fresh:
        model.score = Linear(config.hidden_size, 1)
        initialise(model.score, seed)
        model.score.to(device or "cpu", dtype)
    return model


def config_of(directory: Directory) -> LlamaConfig:
    """The shape of the model in a checkpoint directory."""
    return _read_config(Path(directory))[0]


def is_scorer(directory: Directory) -> bool:
    """Whether a checkpoint directory holds a scorer, not a language model."""
    return SEQUENCE_SCORER in _architectures(_read_config(Path(directory))[1])


def _read_config(directory: Path) -> tuple[LlamaConfig, dict[str, Any]]:
    path = directory / CONFIG
    if not directory.is_dir():
        raise UserError(f"{directory}: no such checkpoint directory", "check the path")
    if not path.exists():
        raise UserError(f"{path}: missing", f"a checkpoint directory has a {CONFIG} beside its weights")
    values = _read_json(path)
    if values.get("model_type") != "llama":
        raise UserError(f"{path}: model_type is '{values.get('model_type')}', not 'llama'",
                        "only models of the Llama 2 family can be loaded")
    rope = values.get("rope_parameters") or {}
    scaling = values.get("rope_scaling") or {}
    fixed = {"hidden_act": ("silu", values.get("hidden_act")), "attention_bias": (False, values.get("attention_bias")),
             "mlp_bias": (False, values.get("mlp_bias")), "rope_type": ("default", rope.get("rope_type")),
             "rope_scaling": ("default", scaling.get("rope_type", scaling.get("type")))}
    for name, (expected, found) in fixed.items():
        if found is not None and found != expected:
            raise UserError(f"{path}: {name} is {found!r}, Llama 2 has {expected!r}", "this model cannot be loaded")
    required = {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"}
    for name in sorted(required - values.keys()):
        raise UserError(f"{path}: the key '{name}' is missing", did_you_mean(name, values))
    known = {name: values[name] for name in LlamaConfig.__dataclass_fields__ if values.get(name) is not None}
    known.setdefault("num_key_value_heads", known["num_attention_heads"])
    known.setdefault("rope_theta", rope.get("rope_theta", 10000.0))
    if isinstance(known.get("eos_token_id"), list):
        known["eos_token_id"] = known["eos_token_id"][0]
    for name, value in known.items():
        if not isinstance(value, int | float):
            raise UserError(f"{path}: {name} is {value!r}", "a number was expected")
    try:
        config = LlamaConfig(**known)
    except UserError as error:
        raise UserError(f"{path}: {error.cause}", error.cure) from None
    if values.get("head_dim") not in (None, config.head_dim):
        raise UserError(f"{path}: head_dim is {values['head_dim']}, Llama 2 has hidden_size / num_attention_heads = "
                        f"{config.head_dim}", "this model cannot be loaded")
    return config, values


def _architectures(values: Mapping[str, Any]) -> list[str]:
    return values.get("architectures") or [LANGUAGE_MODEL]


def _fill(model: Llama | Scorer, directory: Path, dtype: torch.dtype, device: torch.device | str | None,
          fresh_head: bool = False) -> None:
    """Give a model on the meta device its weights, tensor by tensor, so that no second copy of them ever exists."""
    files = _weight_files(directory)
    _verify_checksums(directory)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    with ExitStack() as stack:
        archives = [stack.enter_context(_open(path)) for path in files]
        found = {name: archive for archive in archives for name in archive.keys()}  # noqa: SIM118 (not a mapping)
        ignored = _ignored(model, found, directory, fresh_head)
        if fresh_head:
            del expected[SCORE]
        _check(directory, expected, {name: tuple(archive.get_slice(name).get_shape())
                                     for name, archive in found.items() if name not in ignored})
        for name in expected:
            tensor = found[name].get_tensor(name)
            if not tensor.is_floating_point():
                raise UserError(f"{directory}: tensor '{name}' is {tensor.dtype}, not floating point",
                                "quantized checkpoints cannot be loaded")
            owner, _, attribute = name.rpartition(".")
            # copy: the tensor is a view of the file, which may be replaced while we train
            setattr(model.get_submodule(owner), attribute,
                    nn.Parameter(tensor.to(device or "cpu", dtype, copy=True)))


def _ignored(model: Llama | Scorer, found: Mapping[str, Any], directory: Path, fresh_head: bool) -> set[str]:
    """Tensors that carry nothing: rotary tables of early conversions, and a head the model shares or replaces."""
    ignored = {name for name in found if name.endswith("rotary_emb.inv_freq")}
    if fresh_head:
        return ignored | {HEAD}
    if isinstance(model, Llama) and model.config.tie_word_embeddings and HEAD in found and EMBEDDINGS in found:
        if not torch.equal(found[HEAD].get_tensor(HEAD), found[EMBEDDINGS].get_tensor(EMBEDDINGS)):
            raise UserError(f"{directory}: tie_word_embeddings is true, but {HEAD} differs from {EMBEDDINGS}",
                            f"set tie_word_embeddings to false in {CONFIG}")
        ignored.add(HEAD)
    return ignored


def _check(directory: Path, expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> None:
    """Every expected tensor with its shape and no other, else one error that names them all (a few of each kind)."""
    wrong = [f"{name} {list(found[name])} instead of {list(shape)}"
             for name, shape in expected.items() if name in found and found[name] != shape]
    faults = {"missing": sorted(expected.keys() - found.keys()), "unknown": sorted(found.keys() - expected.keys()),
              "wrongly shaped": wrong}
    listed = [f"{len(names)} {kind}: {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}"
              for kind, names in faults.items() if names]
    if listed:
        raise UserError(f"{directory}: the tensors do not fit {CONFIG}: {'; '.join(listed)}",
                        "the weights and the config are of different models, or the checkpoint is incomplete")


def _weight_files(directory: Path) -> list[Path]:
    """The weight files of a directory: one, or the shards its index names."""
    if (directory / INDEX).exists():
        weight_map = _read_json(directory / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{directory / INDEX}: no weight_map", "fetch the checkpoint again")
        files = [directory / name for name in sorted(set(weight_map.values()))]
        for path in files:
            if not path.exists():
                raise UserError(f"{path}: missing, though {INDEX} names it", "fetch this shard")
        return files
    if (directory / WEIGHTS).exists():
        return [directory / WEIGHTS]
    cure = "convert it to safetensors" if any(directory.glob("*.bin")) else "check the path"
    raise UserError(f"{directory}: neither {WEIGHTS} nor {INDEX} is there", cure)


def _open(path: Path) -> Any:
    try:
        with explain_os_errors(path):
            return safe_open(path, framework="pt", device="cpu")
    except SafetensorError as error:
        raise UserError(f"{path}: truncated or not a safetensors file ({error})", "fetch it again") from error


def _verify_checksums(directory: Path) -> None:
    path = directory / CHECKSUMS
    if not path.exists():
        return
    for name, expected in _read_json(path).items():
        if not (directory / name).exists():
            raise UserError(f"{directory / name}: missing, though {CHECKSUMS} names it", "fetch the checkpoint again")
        if _sha256(directory / name) != expected:
            raise UserError(f"{directory / name}: its checksum differs from {CHECKSUMS}",
                            f"fetch it again, or delete {CHECKSUMS} if you changed the file on purpose")


def _sha256(path: Path) -> str:
    with explain_os_errors(path), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    with explain_os_errors(path):
        text = path.read_bytes()
    try:
        values = json.loads(text)
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})", "fetch it again") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: a JSON object was expected", "fetch it again")
    return values


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
