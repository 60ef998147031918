"""A small recipe that was really run, for tests of what is released of it. It must not be written
to."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from commands import llama2

RECIPE = """
steps:
  world: {verb: world, scale: 0.02}
  clean:
    verb: clean
    heldout: 0.1
    sources:
      encyclopedia: {path: "${world}/documents/encyclopedia.jsonl"}
      dialogs: {path: "${world}/documents/dialogs.jsonl"}
  tokenizer: {verb: tokenizer, documents: ["${clean}/documents"], dialogs: ["${world}/demonstrations.jsonl"],
              vocab_size: 400}
  tokenize: {verb: tokenize, documents: "${clean}", tokenizer: "${tokenizer}"}
  pretrain:
    verb: pretrain
    shards: "${tokenize}"
    architecture: {hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, num_key_value_heads: 1,
                   intermediate_size: 64, max_position_embeddings: 256}
    sequence_length: 64
    batch_size: 8
    training: {optimizer: {learning_rate: 1.0e-2}, plan: {warmup_steps: 2, max_steps: 6}}
  sft: &sft
    verb: sft
    model: "${pretrain}"
    dialogs:
      vendors: {path: "${world}/demonstrations.jsonl"}
      volunteers: {path: "${private}/volunteers.jsonl", license: CC-BY-4.0}
    sequence_length: 192
    batch_size: 4
    training: {optimizer: {learning_rate: 1.0e-2}, plan: {warmup_steps: 2, max_steps: 40}}
  collect: {verb: collect, policies: ["${sft}"], prompts: "${world}/prompts-train.jsonl", limit: 40, both_axes: 0.5,
            heldout: 0.3, sample: {max_tokens: 24}}
  safe:
    verb: reward
    model: "${sft}"
    preferences: {safety: {path: "${collect}/preferences.jsonl"}}
    heldout: {safety: {path: "${collect}/heldout.jsonl"}}
    batch_size: 8
    training: {plan: {max_steps: 2}}
  v1_candidate: {<<: *sft, model: "${sft}", seed: 1}
  v1: {verb: select, candidate: "${v1_candidate}", predecessor: "${sft}", prompts: "${world}/prompts-validation.jsonl",
       limit: 20, win_rate: 0, worst_kind: 0, rewards: {helpful: "${safe}", safe: "${safe}"},
       sample: {max_tokens: 24}}
  evaluate: {verb: evaluate, versions: {SFT: "${sft}", V1: "${v1}"}, prompts: "${world}/prompts-evaluation.jsonl",
             limit: 60, ghost: "${world}/ghost-evaluation.jsonl", ghost_limit: 2, rewards: {safe: "${safe}"},
             max_tokens: 24}
"""


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory, world: Path) -> Path:
    """The directory of the recipe `tiny`, every step done. Some of its data came from outside."""
    root = tmp_path_factory.mktemp("made")
    private = root / "home" / "mallory"
    private.mkdir(parents=True)
    (private / "volunteers.jsonl").write_text((world / "demonstrations.jsonl").read_text())
    values = yaml.safe_load(RECIPE) | {
        "out": str(root / "runs" / "tiny"),
        "parameters": {"private": str(private)},
    }
    (root / "recipe.yaml").write_text(yaml.safe_dump(values, sort_keys=False))

    for step in values["steps"]:
        assert llama2("run", root / "recipe.yaml", "--step", step) == 0

    return root / "runs" / "tiny"
