"""Low-rank adapters as PEFT saves them, merged into the model that they were trained upon.

An adapter of a matrix W [O, I] is a pair A [R, I], B [O, R] of small rank R; what it stands for is
W + s · B·A, where s = alpha / R, or alpha / sqrt(R) with `use_rslora`
(https://arxiv.org/abs/2106.09685, section 4.1). It is added in fp32 and rounded once.
`fan_in_fan_out` says how matrices of other architectures lie; Llama's lie one way, whatever it
says. Settings that would mean another sum (DoRA and many more) are refused by name, those we have
never heard of too.

Modules that were trained whole (`modules_to_save`) take the place of the base's. Where a vocabulary
has grown, PEFT saves them up to three times: what was trained under two names, and what was there
before as `original_module`, which nobody needs. An adapter may part the output matrix from
embeddings that the base shares with it. Where the files of a tokenizer lie beside it, they go
before those of the base, and their EOS ends answers as well.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama2 import json_files
from llama2.errors import UserError
from llama2.formats import hf, hf_directory
from llama2.formats.hf_directory import SCORE
from llama2.formats.stored_model import StoredModel, StoredTensor
from llama2.model.tensors import EMBEDDINGS, HEAD
from llama2.terminal_text import shown
from llama2.tokenizer.chat_settings import read_chat_template, read_stop_ids
from llama2.tokenizer.directory import find_tokenizer

CONFIG, WEIGHTS = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")
_BASE = "base_model_name_or_path"
# of what an adapter stands for: who made it, how it was drawn and trained, which names it has
_CHANGE_NOTHING = {
    "auto_mapping",
    _BASE,
    "revision",
    "task_type",
    "inference_mode",
    "peft_type",
    "peft_version",
    "r",
    "lora_alpha",
    "target_modules",
    "exclude_modules",
    "lora_dropout",
    "fan_in_fan_out",
    "bias",
    "use_rslora",
    "modules_to_save",
    "init_lora_weights",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "megatron_config",
    "megatron_core",
    "loftq_config",
    "eva_config",
    "corda_config",
    "qalora_group_size",
    "runtime_config",
    "ensure_weight_tying",
}
_KEEPS_THE_BASE = (None, True, False, "gaussian", "eva", "orthogonal")
_TRAINED, _REPLACED = ".modules_to_save.", ".original_module."
_WRAPPERS = re.compile(r"^base_model\.model\.|\.(?:modules_to_save|base_layer)(?=\.)")
_PART = re.compile(r"(.+)\.lora_(embedding_)?([AB])(?:\.weight)?$")
_PIECE = 1 << 22  # numbers merged at once


@dataclass
class _Adapter:
    """What one adapter directory holds."""

    path: Path
    values: Mapping[str, Any]
    pairs: dict[str, dict[str, StoredTensor]] = field(default_factory=dict)
    """module -> its A and B"""
    flat: set[str] = field(default_factory=set)
    """modules whose pair is of a table of embeddings, which lies the other way round"""
    whole: dict[str, StoredTensor] = field(default_factory=dict)
    """weights that were trained as they are (`modules_to_save`)"""

    def number(self, module: str, key: str, pattern: str) -> float:
        """A setting, where `pattern` may have another for this module."""
        named, value = key, self.values.get(key)
        for expression, other in (self.values.get(pattern) or {}).items():
            try:
                if re.match(rf"(.*\.)?({expression})$", module):
                    named, value = f"{pattern} of {shown(expression)}", other
                    break
            except (re.error, RecursionError) as error:
                raise UserError(
                    f"{self.path / CONFIG}: {pattern} has {shown(expression)} ({error})", "mend it"
                ) from None

        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not math.isfinite(value)
        ):
            raise UserError(
                f"{self.path / CONFIG}: {named} is {shown(value)}", "a finite number was expected"
            )
        if key == "r" and (value < 1 or value != int(value)):
            raise UserError(
                f"{self.path / CONFIG}: {named} is {shown(value)}",
                "a whole number above 0 was expected",
            )

        return float(value)

    def rank(self, module: str) -> int:
        """R."""
        return int(self.number(module, "r", "rank_pattern"))

    def scale(self, module: str) -> float:
        """The factor of B·A."""
        rank, alpha = self.rank(module), self.number(module, "lora_alpha", "alpha_pattern")
        return alpha / (math.sqrt(rank) if self.values.get("use_rslora") else rank)


def find_base(path: Path, given: Path | None = None) -> Path:
    """Where the model lies that an adapter belongs to: as given, or as its config says."""
    named = json_files.json_object(path / CONFIG).get(_BASE)
    if given is None and (not isinstance(named, str) or not os.path.exists(named)):
        raise UserError(
            f"{path / CONFIG}: the base model {shown(named)} is not on this machine",
            "name its place: --base DIRECTORY",
        )

    return given or Path(str(named))


def read(path: Path, base: StoredModel, dtype: torch.dtype | None = None) -> StoredModel:
    """`base` with the adapter in `path` merged into it, as numbers of type `dtype` (each as its
    base, if None).

    UserError for an adapter of another kind, one that does not fit the base, and what the other
    readers refuse.
    """
    adapter = _open(path)
    scorer = base.scorer or SCORE in adapter.whole
    config = base.config
    tensors = {
        name: stored for name, stored in base.tensors.items() if not (scorer and name == HEAD)
    }

    if config.tie_word_embeddings and not scorer and _parts_the_head(adapter):
        config, tensors[HEAD] = replace(config, tie_word_embeddings=False), tensors[EMBEDDINGS]

    kind = hf.prevailing(base.tensors)
    for name, stored in adapter.whole.items():
        tensors[name] = _converted(
            stored, dtype or (base.tensors[name].dtype if name in base.tensors else kind)
        )

    for module, pair in adapter.pairs.items():
        name = f"{module}.weight"
        if name not in tensors:
            raise UserError(
                f"{next(iter(pair.values())).place}: {base.path} has no {name}",
                "give its own --base",
            )

        tensors[name] = _merged(adapter, module, pair, tensors[name], dtype or tensors[name].dtype)

    if EMBEDDINGS in adapter.whole and len(adapter.whole[EMBEDDINGS].shape) == 2:
        # new items were added
        config = replace(config, vocab_size=adapter.whole[EMBEDDINGS].shape[0])

    config = replace(config, eos_token_id=(*read_stop_ids(path, config.vocab_size), *config.stops))
    shapes = hf_directory.list_shapes(config, scorer=scorer)
    if HEAD not in shapes:  # equal to the embeddings
        tensors.pop(HEAD, None)

    hf_directory.check_shapes(
        path,
        shapes,
        {name: stored.shape for name, stored in tensors.items()},
        f"its base {base.path}",
    )
    tokenizer = find_tokenizer(path, config.vocab_size) or base.tokenizer
    return StoredModel(
        path,
        f"PEFT adapter of {base.format}",
        config,
        scorer,
        {name: tensors[name] for name in shapes},
        tokenizer,
        read_chat_template(path) or base.template,
        base.remarks,
    )


def _open(path: Path) -> _Adapter:
    values = json_files.json_object(path / CONFIG)
    _refuse_others(path / CONFIG, values)
    files = [path / name for name in WEIGHTS if (path / name).exists()][:1]

    if not files:
        raise UserError(
            f"{path}: neither {' nor '.join(WEIGHTS)} is there", "fetch the adapter again"
        )

    adapter = _Adapter(path, values)
    for folded, stored in _folded(hf.entries(files)).items():
        if part := _PART.match(folded):
            adapter.pairs.setdefault(part[1], {})[part[3]] = stored
            adapter.flat |= {part[1]} if part[2] else set()
        elif folded.endswith(".weight") and "lora" not in folded:
            adapter.whole[folded] = stored
        else:
            raise UserError(
                f"{stored.place}: this is no part of a plain LoRA adapter",
                "merge it with the program that trained it",
            )

    if not adapter.pairs:
        raise UserError(
            f"{files[0]}: there is no adapter in it (no lora_A, no lora_B)", "fetch it again"
        )

    return adapter


def _folded(entries: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors by their names in the base, without those that were replaced by what was
    trained."""
    found: dict[str, StoredTensor] = {}
    for name, stored in entries.items():
        if _REPLACED in name and any(
            name.replace(_REPLACED, by) in entries for by in (_TRAINED, ".")
        ):
            continue

        folded = _WRAPPERS.sub("", name)
        twin = found.setdefault(folded, stored)
        if twin is not stored and not (
            twin.shape == stored.shape and torch.equal(twin.read(), stored.read())
        ):
            raise UserError(
                f"{stored.place} and {twin.place} are both {folded}, and differ",
                "save the adapter again with the program that trained it",
            )

    return found


def _parts_the_head(adapter: _Adapter) -> bool:
    """Whether an adapter of a model that shares its embeddings with its output changes the two in
    different ways."""
    embeddings, head = (adapter.whole.get(name) for name in (EMBEDDINGS, HEAD))
    changed = {*adapter.whole, *(f"{module}.weight" for module in adapter.pairs)} & {
        EMBEDDINGS,
        HEAD,
    }
    trained = any(f"{module}.weight" in changed for module in adapter.pairs)

    if embeddings is None or head is None or trained:
        return bool(changed)

    return embeddings.shape != head.shape or not torch.equal(embeddings.read(), head.read())


def _refuse_others(file: Path, values: Mapping[str, Any]) -> None:
    """UserError for settings under which W + s · B·A would not be the model that was trained."""
    cure = "merge it with the program that trained it, and import the result"
    if values.get("peft_type") != "LORA":
        raise UserError(
            f"{file}: peft_type is {shown(values.get('peft_type'))}, only LORA can be merged", cure
        )

    for name in sorted(values.keys() - _CHANGE_NOTHING):
        if values[name]:
            raise UserError(
                f"{file}: {name} is {shown(values[name])}, only plain LoRA can be merged", cure
            )

    if not any(
        values.get("init_lora_weights") is known or values.get("init_lora_weights") == known
        for known in _KEEPS_THE_BASE
    ):
        raise UserError(
            f"{file}: init_lora_weights is {shown(values['init_lora_weights'])}, which changes the base",
            cure,
        )
    if values.get("task_type") not in (None, "CAUSAL_LM", "SEQ_CLS"):
        raise UserError(
            f"{file}: task_type is {shown(values['task_type'])}, CAUSAL_LM or SEQ_CLS was expected",
            cure,
        )

    for name in ("rank_pattern", "alpha_pattern"):
        if not isinstance(values.get(name) or {}, dict):
            raise UserError(
                f"{file}: {name} is {shown(values[name])}", "a JSON object was expected"
            )


def _converted(stored: StoredTensor, dtype: torch.dtype) -> StoredTensor:
    return replace(stored, dtype=dtype, read=lambda: stored.read().to(dtype))


def _merged(
    adapter: _Adapter,
    module: str,
    pair: Mapping[str, StoredTensor],
    weight: StoredTensor,
    dtype: torch.dtype,
) -> StoredTensor:
    """The sum of a matrix [O, I] and its adapter, which is worked out when it is read."""
    for letter in "AB":
        if letter not in pair:
            raise UserError(
                f"{adapter.path}: {module} has no lora_{letter}", "fetch the adapter again"
            )

    flat = module in adapter.flat
    wide, tall = (pair["B"], pair["A"]) if flat else (pair["A"], pair["B"])
    rank = adapter.rank(module)
    outputs, inputs = weight.shape if len(weight.shape) == 2 else (0, 0)

    for stored, shape in ((wide, (rank, inputs)), (tall, (outputs, rank))):
        expected = shape[::-1] if flat else shape
        if stored.shape != expected:
            raise UserError(
                f"{stored.place} is {list(stored.shape)} instead of {list(expected)}",
                f"the adapter and its {CONFIG}, or its base, do not belong together",
            )

    scale = adapter.scale(module)

    def read() -> Tensor:
        a_RI, b_OR = wide.read().float(), tall.read().float()
        if flat:
            a_RI, b_OR = a_RI.T, b_OR.T

        weight_OI = weight.read()
        merged_OI = (
            weight_OI if weight_OI.dtype == dtype else torch.empty(weight.shape, dtype=dtype)
        )
        rows = max(1, _PIECE // inputs)

        for start in range(0, outputs, rows):
            part = slice(start, start + rows)
            merged_OI[part] = weight_OI[part].float().addmm_(b_OR[part], a_RI, alpha=scale)

        return merged_OI

    return StoredTensor(weight.shape, dtype, read, f"{weight.place} with its adapter")
