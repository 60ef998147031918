"""Read low-rank adapters as PEFT saves them, merged into the model that they were trained upon.

An adapter of a matrix W [O, I] is a pair A [R, I], B [O, R] of small rank R; what it stands for is
W + s · B·A, where s = alpha / R, or alpha / sqrt(R) with `use_rslora`
(https://arxiv.org/abs/2106.09685, section 4.1). It is added in fp32 and rounded once.
`fan_in_fan_out` says how matrices of other architectures lie; Llama's lie one way, whatever it
says. Settings that would mean another sum (DoRA and many more) are refused by name, unknown ones
too.

Modules that were trained whole (`modules_to_save`) take the place of the base's. Where a vocabulary
has grown, PEFT saves them up to three times: the trained module under two names, and the one before
as `original_module`, which nobody needs. An adapter may untie the output matrix from embeddings
that the base shares with it. The files of a tokenizer beside it go before those of the base, and
their EOS ends answers as well.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
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
from llama2.terminal_text import show_value
from llama2.tokenizer.chat_settings import read_chat_template, read_section, read_stop_ids
from llama2.tokenizer.directory import find_tokenizer

CONFIG, WEIGHTS = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")
_BASE = "base_model_name_or_path"
# of the sum: provenance, initial values, training, names
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
_CHUNK = 1 << 22  # numbers merged at once
_FETCH, _MERGE = "fetch the adapter again", "merge it with the program that trained it"


@dataclass(frozen=True)
class _Adapter:
    """The content of an adapter directory.

    `pairs` are A and B of each module; `flat` the modules whose pair is of a table of embeddings,
    which lies the other way round; `whole` the weights that were trained as they are.
    """

    file: Path
    settings: Mapping[str, Any]
    pairs: Mapping[str, Mapping[str, StoredTensor]]
    flat: Collection[str]
    whole: Mapping[str, StoredTensor]

    def find_number(self, module: str, key: str, pattern: str) -> float:
        """Return a setting; `pattern` may have another value for this module."""
        name = key
        value: Any = self.settings.get(key)
        for expression, other in read_section(self.file, self.settings, pattern).items():
            try:
                if re.match(rf"(.*\.)?({expression})$", module):
                    name, value = f"{pattern} of {show_value(expression)}", other
                    break
            except (re.error, RecursionError) as error:
                raise UserError(
                    f"{self.file}: {pattern} has {show_value(expression)} ({error})", "mend it"
                ) from None

        expected = "a finite number was expected"
        if type(value) in (int, float) and math.isfinite(value):
            if key != "r" or (value >= 1 and value == int(value)):
                return float(value)

            expected = "a whole number above 0 was expected"

        raise UserError(f"{self.file}: {name} is {show_value(value)}", expected)

    def find_rank(self, module: str) -> int:
        """Return R."""
        return int(self.find_number(module, "r", "rank_pattern"))

    def find_scale(self, module: str) -> float:
        """Return the factor of B·A."""
        rank = self.find_rank(module)
        divisor = math.sqrt(rank) if self.settings.get("use_rslora") else rank
        return self.find_number(module, "lora_alpha", "alpha_pattern") / divisor

    def unties_head(self) -> bool:
        """Return whether it changes embeddings, and the output matrix they share, differently."""
        trained = {f"{module}.weight" for module in self.pairs} & {EMBEDDINGS, HEAD}
        embeddings, head = self.whole.get(EMBEDDINGS), self.whole.get(HEAD)
        if trained or embeddings is None or head is None:
            return bool(trained or embeddings or head)

        return not _equal(embeddings, head)


def find_base(path: Path, given: Path | None = None) -> Path:
    """Return the place of the model that an adapter belongs to: given, or named in its config."""
    name = json_files.read_object(path / CONFIG).get(_BASE)
    if given is None and (not isinstance(name, str) or not os.path.exists(name)):
        raise UserError(
            f"{path / CONFIG}: the base model {show_value(name)} is not on this machine",
            "name its place: --base DIRECTORY",
        )

    return given or Path(str(name))


def read(path: Path, base: StoredModel, dtype: torch.dtype | None = None) -> StoredModel:
    """Merge the adapter in `path` into `base`, as numbers of type `dtype` (or as the base's).

    UserError for an adapter of another kind, one that does not fit the base, and whatever the other
    readers refuse.
    """
    adapter = _open(path)
    scorer = base.scorer or SCORE in adapter.whole
    config, tensors = base.config, dict(base.tensors)
    if scorer:
        tensors.pop(HEAD, None)
    elif config.tie_word_embeddings and adapter.unties_head():
        config, tensors[HEAD] = replace(config, tie_word_embeddings=False), tensors[EMBEDDINGS]

    prevailing = hf.find_prevailing_dtype(base.tensors)
    kinds = {name: stored.dtype for name, stored in base.tensors.items()}
    for name, stored in adapter.whole.items():
        tensors[name] = _convert(stored, dtype or kinds.get(name, prevailing))

    for module, pair in adapter.pairs.items():
        name = f"{module}.weight"
        if name not in tensors:
            raise UserError(
                f"{next(iter(pair.values())).place}: {base.path} has no {name}",
                "give its own --base",
            )

        tensors[name] = _merge(adapter, module, tensors[name], dtype or tensors[name].dtype)

    embeddings = adapter.whole.get(EMBEDDINGS)
    if embeddings is not None and len(embeddings.shape) == 2:  # items may have been added
        config = replace(config, vocab_size=embeddings.shape[0])

    config = replace(config, eos_token_id=(*read_stop_ids(path, config.vocab_size), *config.stops))
    shapes = hf_directory.list_shapes(config, scorer=scorer)
    if HEAD not in shapes:  # equal to the embeddings
        tensors.pop(HEAD, None)

    actual = {name: stored.shape for name, stored in tensors.items()}
    hf_directory.check_shapes(path, shapes, actual, f"its base {base.path}")
    return replace(
        base,
        path=path,
        format=f"PEFT adapter of {base.format}",
        config=config,
        scorer=scorer,
        tensors={name: tensors[name] for name in shapes},
        tokenizer=find_tokenizer(path, config.vocab_size) or base.tokenizer,
        template=read_chat_template(path) or base.template,
    )


def _open(path: Path) -> _Adapter:
    settings = json_files.read_object(path / CONFIG)
    _refuse_others(path / CONFIG, settings)
    files = [path / name for name in WEIGHTS if (path / name).exists()][:1]
    if not files:
        raise UserError(f"{path}: neither {' nor '.join(WEIGHTS)} is there", _FETCH)

    pairs: dict[str, dict[str, StoredTensor]] = {}
    flat, replaced = set(), {}
    for name, stored in _fold_names(hf.list_tensors(files)).items():
        if part := _PART.match(name):
            module, table, letter = part.groups()
            pairs.setdefault(module, {})[letter] = stored
            flat |= {module} if table else set()
        elif name.endswith(".weight") and "lora" not in name:
            replaced[name] = stored
        else:
            raise UserError(f"{stored.place}: this is no part of a plain LoRA adapter", _MERGE)

    if not pairs:
        raise UserError(f"{files[0]}: there is no adapter in it (no lora_A, no lora_B)", _FETCH)

    return _Adapter(path / CONFIG, settings, pairs, flat, replaced)


def _fold_names(entries: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Return the tensors by their names in the base, without those that training replaced."""
    folded: dict[str, StoredTensor] = {}
    for name, stored in entries.items():
        trained = {name.replace(_REPLACED, by) for by in (_TRAINED, ".")}
        if _REPLACED in name and trained & entries.keys():
            continue

        short = _WRAPPERS.sub("", name)
        twin = folded.setdefault(short, stored)
        if twin is not stored and not _equal(twin, stored):
            raise UserError(
                f"{stored.place} and {twin.place} are both {short}, and differ",
                "save the adapter again with the program that trained it",
            )

    return folded


def _equal(a: StoredTensor, b: StoredTensor) -> bool:
    return a.shape == b.shape and torch.equal(a.read(), b.read())


def _refuse_others(file: Path, settings: Mapping[str, Any]) -> None:
    """UserError for settings under which W + s · B·A would not be the model that was trained."""
    rules = {
        "peft_type": (("LORA",), "only LORA can be merged"),
        **dict.fromkeys(
            sorted(settings.keys() - _CHANGE_NOTHING), ((), "only plain LoRA can be merged")
        ),
        "init_lora_weights": (_KEEPS_THE_BASE, "which changes the base"),
        "task_type": ((None, "CAUSAL_LM", "SEQ_CLS"), "CAUSAL_LM or SEQ_CLS was expected"),
    }
    for name, (allowed, reason) in rules.items():
        value = settings.get(name)
        if value not in allowed and (allowed or value):
            raise UserError(
                f"{file}: {name} is {show_value(value)}, {reason}",
                f"{_MERGE}, and import the result",
            )

    for name in ("rank_pattern", "alpha_pattern"):
        read_section(file, settings, name)


def _convert(stored: StoredTensor, dtype: torch.dtype) -> StoredTensor:
    return replace(stored, dtype=dtype, read=lambda: stored.read().to(dtype))


def _merge(
    adapter: _Adapter, module: str, weight: StoredTensor, dtype: torch.dtype
) -> StoredTensor:
    """Return the sum of a matrix [O, I] and its adapter, which is computed when it is read."""
    pair, flat = adapter.pairs[module], module in adapter.flat
    for letter in "AB":
        if letter not in pair:
            raise UserError(f"{adapter.file.parent}: {module} has no lora_{letter}", _FETCH)

    wide, tall = (pair["B"], pair["A"]) if flat else (pair["A"], pair["B"])
    rank, scale = adapter.find_rank(module), adapter.find_scale(module)
    outputs, inputs = weight.shape if len(weight.shape) == 2 else (0, 0)

    for stored, shape in ((wide, (rank, inputs)), (tall, (outputs, rank))):
        expected = shape[::-1] if flat else shape
        if stored.shape != expected:
            raise UserError(
                f"{stored.place} is {list(stored.shape)} instead of {list(expected)}",
                f"the adapter and its {CONFIG}, or its base, do not belong together",
            )

    def read() -> Tensor:
        a_RI, b_OR = wide.read().float(), tall.read().float()
        if flat:
            a_RI, b_OR = a_RI.T, b_OR.T

        weight_OI = weight.read()
        merged_OI = weight_OI
        if weight_OI.dtype != dtype:
            merged_OI = torch.empty(weight.shape, dtype=dtype)

        rows = max(1, _CHUNK // inputs)
        for start in range(0, outputs, rows):
            part = slice(start, start + rows)
            merged_OI[part] = weight_OI[part].float().addmm_(b_OR[part], a_RI, alpha=scale)

        return merged_OI

    return StoredTensor(weight.shape, dtype, read, f"{weight.place} with its adapter")
