"""Cases of PEFT: adapters with whole modules beside them, new vocabulary items, shared
embeddings."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from checks import Work, is_refusal, refusal
from safetensors.torch import save_file
from torch import Tensor
from weights import ids, ours, tensors, whole

if TYPE_CHECKING:
    from run import Bench, Got

HEAD, EMBEDDINGS = "lm_head", "model.embed_tokens"
QUERY = "model.layers.0.self_attn.q_proj"
MORE = 8


def base(bench: Bench, tied: bool) -> Path:
    place = whole(bench, bench.model, f"base-{tied}", {"tie_word_embeddings": tied})
    (place / "checksums.json").unlink(missing_ok=True)
    return place


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.1


def adapter(bench: Bench, name: str, found: Mapping[str, Tensor], **settings: Any) -> Path:
    """An adapter directory as PEFT saves it: rank 4, alpha 8, on the query of the first layer."""
    place = bench.scratch / "adapters" / name
    place.mkdir(parents=True, exist_ok=True)
    width = 32
    pair = {
        f"base_model.model.{QUERY}.lora_A.weight": drawn(4, width, seed=1),
        f"base_model.model.{QUERY}.lora_B.weight": drawn(width, 4, seed=2),
    }
    save_file(
        {
            **pair,
            **{
                f"base_model.model.{key}": value.contiguous().clone()
                for key, value in found.items()
            },
        },
        place / "adapter_model.safetensors",
    )
    (place / "adapter_config.json").write_text(
        json.dumps(
            {
                "peft_type": "LORA",
                "task_type": "CAUSAL_LM",
                "r": 4,
                "lora_alpha": 8,
                "target_modules": ["q_proj"],
                "bias": "none",
                "fan_in_fan_out": False,
                "use_rslora": False,
                "use_dora": False,
                "modules_to_save": None,
                "base_model_name_or_path": "base",
                **settings,
            }
        )
    )

    return place


def _expected(place: Path, whole_modules: Mapping[str, Tensor], asked: Tensor) -> Tensor:
    """Logits of the base with the sum on its query and other modules in the place of its own, by
    transformers."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(place, dtype=torch.float32).eval()
    rows = max([value.shape[0] for value in whole_modules.values()], default=0)

    if rows > model.config.vocab_size:
        model.resize_token_embeddings(rows, mean_resizing=False)

    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    with torch.no_grad():
        model.get_submodule(QUERY).weight += 2.0 * drawn(32, 4, seed=2) @ drawn(4, 32, seed=1)
        for name, value in whole_modules.items():
            model.get_submodule(name).weight.copy_(value)

        return model(asked).logits  # type: ignore[no-any-return]


def _joined(bench: Bench, place: Path, adapted: Path) -> Got:
    return bench.llama2("import", str(adapted), "--base", str(place), "--out", "OUT")


def cases() -> Iterator[tuple[str, str, Work]]:
    """Name, what is expected, and the work."""

    def saved(
        rows: int,
        tied: bool = False,
        form: str = "peft",
        modules: tuple[str, ...] = (EMBEDDINGS, HEAD),
    ) -> Work:
        def work(bench: Bench) -> tuple[bool, str]:
            place = base(bench, tied)
            own = tensors(place)
            size = own[f"{EMBEDDINGS}.weight"].shape[0] + rows
            new = {
                name: drawn(size, 32, seed=7 + (0 if tied else index))
                for index, name in enumerate(modules)
            }
            found: dict[str, Tensor] = {}

            for name, value in new.items():
                if form == "peft" and not tied:
                    found[f"{name}.weight"] = value
                    found[f"{name}.modules_to_save.weight"] = value
                    found[f"{name}.original_module.weight"] = drawn(size, 32, seed=99)
                else:
                    found[f"{name}.weight"] = value

            got = _joined(
                bench,
                place,
                adapter(
                    bench,
                    f"{form}-{rows}-{tied}-{len(modules)}",
                    found,
                    modules_to_save=None if tied else [name.rpartition(".")[2] for name in modules],
                ),
            )
            if got.status:
                return False, got.short()

            asked = ids(got.out)
            apart = float((ours(got.out, asked) - _expected(place, new, asked)).abs().max())
            return apart < 1e-3, f"{got.short()} | logits {apart:.2g} apart"

        return work

    yield "peft: a plain adapter", "PEFT's own sum", saved(0, modules=())
    yield "peft: modules_to_save", "PEFT's own sum, with the saved modules", saved(0)
    yield "peft: modules_to_save, resized", "PEFT's own sum, with the saved modules", saved(MORE)
    yield "peft: the head alone", "PEFT's own sum, with the saved module", saved(0, modules=(HEAD,))
    yield (
        "peft: whole modules, resized",
        "PEFT's own sum, with the saved modules",
        saved(MORE, form="whole"),
    )
    yield (
        "peft: a shared base, resized",
        "both copies are equal: they take its place",
        saved(MORE, tied=True),
    )

    def torn(bench: Bench) -> tuple[bool, str]:
        place = base(bench, True)
        size = tensors(place)[f"{EMBEDDINGS}.weight"].shape[0] + MORE
        both = {EMBEDDINGS: drawn(size, 32, seed=7), HEAD: drawn(size, 32, seed=8)}
        got = _joined(
            bench,
            place,
            adapter(bench, "torn", {f"{name}.weight": value for name, value in both.items()}),
        )

        if is_refusal(got, "share|differ|tie"):
            return True, got.short()

        asked = ids(got.out)
        apart = float((ours(got.out, asked) - _expected(place, both, asked)).abs().max())
        return apart < 1e-3, f"{got.short()} | logits {apart:.2g} apart"

    yield "peft: a shared base, two modules that differ", "refused, or each in its place", torn

    def two(bench: Bench) -> tuple[bool, str]:
        """Two names of one module whose values differ: the trained one, or a refusal; never by
        order in the file."""
        place, size = base(bench, False), 320
        trained, other = drawn(size, 32, seed=7), drawn(size, 32, seed=8)
        both = {f"{HEAD}.weight": other, f"{HEAD}.modules_to_save.weight": trained}
        got = _joined(bench, place, adapter(bench, "two", both, modules_to_save=["lm_head"]))

        if is_refusal(got, "lm_head"):
            return True, got.short()

        asked = ids(got.out)
        apart = float((ours(got.out, asked) - _expected(place, {HEAD: trained}, asked)).abs().max())
        return apart < 1e-3, f"{got.short()} | logits {apart:.2g} apart"

    yield "peft: two names of one module", "the trained one, or refused", two
    for settings, pattern in (
        ({"use_dora": True}, "dora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"trainable_token_indices": {"embed_tokens": [5]}}, "trainable_token_indices"),
        ({"target_parameters": ["mlp.gate_proj.weight"]}, "target_parameters"),
        ({"r": float("inf")}, r"\br\b"),
        ({"r": 0}, r"\br\b|lora_A"),
        ({"r": -4}, r"\br\b|lora_A"),
        ({"r": 2**70}, r"\br\b|lora_A"),
        ({"lora_alpha": float("nan")}, "lora_alpha"),
        ({"r": None}, r"\br\b"),
        ({"lora_alpha": 10**400}, "lora_alpha"),
    ):
        yield f"peft: {str(settings)[:60]}", "refused by name", _odd(settings, pattern)

    yield "peft: rsLoRA", "the scale is alpha / sqrt(r)", _rank_stabilised


def _odd(settings: Mapping[str, Any], pattern: str) -> Work:
    return lambda bench: refusal(
        _joined(bench, base(bench, False), adapter(bench, "odd", {}, **settings)), pattern
    )


def _rank_stabilised(bench: Bench) -> tuple[bool, str]:
    place = base(bench, False)
    got = _joined(bench, place, adapter(bench, "rslora", {}, use_rslora=True))
    if got.status:
        return False, got.short()

    own, found = tensors(place), tensors(got.out)
    expected = own[f"{QUERY}.weight"] + 4.0 * drawn(32, 4, seed=2) @ drawn(4, 32, seed=1)
    apart = float((found[f"{QUERY}.weight"] - expected).abs().max())

    return apart < 1e-5, f"{apart:.2g} apart"
