"""Adapters that PEFT itself made, merged by `import`: logits are those that PEFT computes with the
adapter in place.

LLAMA2_PEER_PEFT names an interpreter that has peft, transformers and torch; without it these are
skipped.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from commands import llama2
from sources import model_of

from llama2.formats import checkpoint
from llama2.model.llama import LlamaConfig

PYTHON = os.environ.get("LLAMA2_PEER_PEFT")
pytestmark = pytest.mark.skipif(PYTHON is None, reason="LLAMA2_PEER_PEFT names no interpreter")
ITEMS, MORE = 96, 104
BOTH = ["embed_tokens", "lm_head"]
CASES: dict[str, tuple[int | None, dict[str, object]]] = {
    "plain": (None, {"target_modules": ["q_proj", "v_proj"]}),
    "all": (None, {"target_modules": "all-linear", "use_rslora": True}),
    "patterns": (
        None,
        {
            "target_modules": ["q_proj", "v_proj"],
            "rank_pattern": {"q_proj": 2},
            "alpha_pattern": {r"^model\.layers\.1\.self_attn\.v_proj": 32},
        },
    ),
    "saved": (None, {"target_modules": ["q_proj"], "modules_to_save": BOTH}),
    "saved head": (None, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "saved embeddings": (None, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    "saved inside": (
        None,
        {"target_modules": ["q_proj"], "modules_to_save": ["norm", "mlp.down_proj"]},
    ),
    "grown": (MORE, {"target_modules": ["q_proj"]}),
    "grown and saved": (MORE, {"target_modules": ["q_proj"], "modules_to_save": BOTH}),
    "grown, embeddings saved": (
        MORE,
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    ),
    "on the tables": (None, {"target_modules": ["q_proj", *BOTH]}),
    "grown, on the tables": (MORE, {"target_modules": ["q_proj", *BOTH]}),
    "tied together": (
        None,
        {"target_modules": ["q_proj"], "modules_to_save": BOTH, "ensure_weight_tying": True},
    ),
}


@pytest.mark.parametrize("tied", [False, True], ids=["two tables", "one table"])
def test_what_was_merged_computes_what_peft_computes(tmp_path: Path, tied: bool) -> None:
    shape = LlamaConfig(
        ITEMS, 32, 48, 2, 4, 2, max_position_embeddings=128, tie_word_embeddings=tied
    )
    checkpoint.save(model_of(shape), tmp_path / "base")
    subprocess.run(
        [
            str(PYTHON),
            str(Path(__file__).with_name("peft_peer.py")),
            str(tmp_path / "base"),
            str(tmp_path),
            json.dumps(CASES),
        ],
        check=True,
        env={"PATH": os.environ["PATH"], "HF_HUB_OFFLINE": "1"},
    )

    for name, (rows, _) in CASES.items():
        assert llama2("import", tmp_path / name, "--out", tmp_path / "merged" / name) == 0
        merged = checkpoint.load(tmp_path / "merged" / name)
        assert merged.config.vocab_size == (rows or ITEMS)
        theirs = torch.load(tmp_path / name / "logits.pt")

        with torch.no_grad():
            apart = (merged(torch.arange(3, 40)[None]) - theirs).abs().max().item()

        assert apart < 2e-5 * theirs.abs().max().item(), name
