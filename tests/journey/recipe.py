"""A whole recipe in a minute: every verb, a dozen updates a stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

TEXT = """
cores: 2
steps:
  world: {verb: world, cores: 1, scale: 0.02}
  clean:
    verb: clean
    cores: 1
    heldout: 0.1
    sources:
      encyclopedia: {path: "${world}/documents/encyclopedia.jsonl"}
      dialogs: {path: "${world}/documents/dialogs.jsonl"}
  tokenizer:
    verb: tokenizer
    cores: 1
    documents: ["${clean}/documents"]
    dialogs: ["${world}/demonstrations.jsonl"]
    vocab_size: 400
  tokenize: {verb: tokenize, cores: 1, documents: "${clean}", tokenizer: "${tokenizer}"}
  pretrain:
    verb: pretrain
    processes: 2
    shards: "${tokenize}"
    architecture: {hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, num_key_value_heads: 2,
                   intermediate_size: 48, max_position_embeddings: 256}
    sequence_length: 64
    batch_size: 8
    training: &training
      optimizer: {learning_rate: 1.0e-2}
      plan: {warmup_steps: 2, max_steps: 20, save_every: 5}
  sft: &sft
    verb: sft
    cores: 1
    model: "${pretrain}"
    dialogs: {vendors: {path: "${world}/demonstrations.jsonl"}}
    sequence_length: 192
    batch_size: 4
    epochs: 3
    training: {optimizer: {learning_rate: 1.0e-2}, plan: {warmup_steps: 2, save_every: 5}}
  collect:
    verb: collect
    processes: 2
    policies: ["${sft}"]
    prompts: "${world}/prompts-train.jsonl"
    both_axes: 0.5
    heldout: 0.2
    sample: &sample {max_tokens: 32}
  helpful: &reward
    verb: reward
    cores: 1
    model: "${sft}"
    preferences: {helpfulness: {path: "${collect}/preferences.jsonl", axis: helpful}}
    heldout: {helpfulness: {path: "${collect}/heldout.jsonl", axis: helpful}}
    batch_size: 16
    training: {optimizer: {learning_rate: 1.0e-3}, plan: {max_steps: 8, save_every: 3}}
  safe:
    <<: *reward
    preferences: {safety: {path: "${collect}/preferences.jsonl", axis: safe}}
    auxiliary_weight: 0.5
  distill:
    verb: distill
    cores: 1
    policy: "${sft}"
    rewards: &rewards {helpful: "${helpful}", safe: "${safe}"}
    prompts: "${world}/prompts-train.jsonl"
    limit: 24
    preprompts: ["Be a {a} and {b} assistant."]
    templates: {}
    sample: *sample
  rejection:
    verb: rejection
    cores: 1
    policy: "${sft}"
    rewards: *rewards
    prompts: "${world}/prompts-train.jsonl"
    limit: 24
    k: 4
    temperatures: [0.8, 1.0]
    search_prompts: 8
    sample: *sample
  ghost:
    verb: ghost
    cores: 1
    policy: "${sft}"
    conversations: "${world}/ghost-train.jsonl"
    sample: *sample
  v1_candidate:
    <<: *sft
    model: "${sft}"
    epochs: 1
    dialogs:
      rejection: {path: "${rejection}/pool.jsonl"}
      distillation: {path: "${distill}/dialogs.jsonl"}
      ghost: {path: "${ghost}/dialogs.jsonl"}
  v1:
    verb: select
    cores: 1
    candidate: "${v1_candidate}"
    predecessor: "${sft}"
    prompts: "${world}/prompts-validation.jsonl"
    sample: *sample
  v2:
    verb: ppo
    processes: 2
    policy: "${v1}"
    rewards: *rewards
    prompts: "${world}/prompts-train.jsonl"
    heldout: "${world}/prompts-validation.jsonl"
    iterations: 3
    batch_size: 16
    minibatch_size: 8
    validate_iterations: 1
    sample: *sample
    training: {optimizer: {learning_rate: 1.0e-4}, plan: {save_every: 3}}
  evaluate:
    verb: evaluate
    processes: 2
    versions: {SFT: "${sft}", V1: "${v1}", V2: "${v2}"}
    prompts: "${world}/prompts-evaluation.jsonl"
    ghost: "${world}/ghost-evaluation.jsonl"
    rewards: *rewards
    limit: 12
    ghost_limit: 3
    max_tokens: 32
    attention: [SFT, V1]
  report: {verb: report, cores: 1, recipe: "${out}", after: ["${evaluate}"]}
"""


def write(path: Path, **changes: Any) -> Path:
    """The recipe as a file; `changes` replace keys of it."""
    path.write_text(yaml.safe_dump({**yaml.safe_load(TEXT), **changes}, sort_keys=False))
    return path
