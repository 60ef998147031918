"""Random weights for configurations that come without, and transformers as the judge of what is
read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llama2.formats import checkpoint
from llama2.formats.hf_directory import list_shapes
from llama2.model.llama import LlamaConfig

if TYPE_CHECKING:
    from run import Bench, Got

CLOSE = 1e-3
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "tie_word_embeddings",
)


def whole(
    bench: Bench,
    source: Path | str,
    name: str,
    changes: Mapping[str, Any] | None = None,
    spread: float = 0.2,
) -> Path:
    """A copy of a folder of inputs with weights; `changes` are to its config.json, where None drops
    a key."""
    place = bench.scratch / "models" / name
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)

    for file in Path(source).iterdir():
        shutil.copyfile(file, place / file.name)

    values = json.loads((place / "config.json").read_text("utf-8"))
    for key, value in (changes or {}).items():
        values[key] = value
        if value is None:
            del values[key]

    (place / "config.json").write_text(json.dumps(values, indent=1), "utf-8")
    save_file(
        drawn({key: values[key] for key in SIZES}, spread),
        place / "model.safetensors",
        {"format": "pt"},
    )
    return place


def drawn(sizes: Mapping[str, Any], spread: float = 0.2, seed: int = 0) -> dict[str, Tensor]:
    """The tensors of a model of these sizes."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator) * spread + (len(shape) == 1)
        for name, shape in list_shapes(LlamaConfig(**sizes)).items()
    }


def ids(place: Path, length: int = 60) -> Tensor:
    vocabulary = json.loads((place / "config.json").read_text("utf-8"))["vocab_size"]
    return torch.randint(3, vocabulary, (1, length), generator=torch.Generator().manual_seed(5))


def theirs(place: Path, asked: Tensor, **changes: Any) -> Tensor:
    """Logits of transformers for a directory."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(place, dtype=torch.float32, **changes).eval()
    with torch.no_grad():
        return model(asked).logits  # type: ignore[no-any-return]


def ours(place: Path, asked: Tensor) -> Tensor:
    """Logits of the product for a directory."""
    with torch.no_grad():
        return checkpoint.load(place).eval()(asked)  # type: ignore[no-any-return]


def as_theirs(got: Got, place: Path, **changes: Any) -> tuple[bool, str]:
    """Whether an import went well and its logits are those of transformers for what was
    imported."""
    if got.status:
        return False, got.short()

    asked = ids(place)
    apart = float((ours(got.out, asked) - theirs(place, asked, **changes)).abs().max())
    return apart < CLOSE, f"{got.short()} | logits {apart:.2g} apart"


def tensors(place: Path) -> dict[str, Tensor]:
    return load_file(place / "model.safetensors")
