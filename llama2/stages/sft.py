"""Supervised fine-tuning (§3.1): dialogs packed into full rows, loss on the assistant's tokens only, two epochs.

The paper's cosine starts at 2e-5 with batches of 64 rows of 4096 tokens. It does not state warm-up (none here) or
whether attention crosses packed dialogs (it does not here). Rejection sampling, Ghost Attention and context
distillation all end in this stage, each with its own dialogs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import Field
from torch import nn

from llama2 import records
from llama2.config import Config as Section
from llama2.config import StageConfig
from llama2.data.loader import Rows
from llama2.data.pack import Packed, collate, pack
from llama2.errors import UserError
from llama2.records import Dialog
from llama2.runs import Run, is_output
from llama2.stages.planning import UNKNOWN, Cluster, Lineage, Tower, flops_per_token, training_plan
from llama2.stages.training import Training, heldout_loss, load_policy, saver, train, validated
from llama2.tokenizer.template import encode_dialog
from llama2.tokenizer.tokenizer import Tokenizer
from llama2.train import hooks
from llama2.train.loop import Plan
from llama2.train.objectives import next_token
from llama2.train.optim import AdamW


class Dialogs(Section):
    """One set of dialogs."""

    incidental: ClassVar[frozenset[str]] = frozenset({"license"})

    path: Path
    """JSONL of dialogs: {"messages": [{"role": ..., "content": ...}, ...]}"""
    weight: float = Field(1.0, gt=0)
    """read it this often an epoch: 2 reads it twice, 0.5 reads a random half"""
    license: str | None = None
    """its licence, for the papers of a release; nothing depends on it"""


class Config(StageConfig):
    """Fine-tune on dialogs."""

    model: Path
    dialogs: Annotated[dict[str, Dialogs], Field(min_length=1)]
    """name -> dialogs; they are mixed"""
    sequence_length: int = Field(4096, gt=1)
    batch_size: int = Field(64, gt=0)
    """rows of sequence_length tokens in an optimizer step, over all ranks"""
    micro_batch_size: int = Field(4, gt=0)
    epochs: int = Field(2, gt=0)
    heldout: float = Field(0.02, ge=0, lt=1)
    """share of dialogs kept for validation"""
    training: Training = Training(optimizer=AdamW(learning_rate=2e-5), plan=Plan(save_every=200))


def plan(config: Config, cluster: Cluster, lineage: Lineage) -> dict[str, Any]:
    """Parameters and memory; steps are known once the data is read."""
    shape = lineage.inherit(config.out, config.model)
    if shape is None:
        return UNKNOWN
    return training_plan([Tower(shape)], config.training, cluster, rows=config.batch_size,
                         micro_rows=config.micro_batch_size, length=config.sequence_length,
                         steps=config.training.plan.max_steps, packed=True)


def run(config: Config, run: Run) -> None:
    """Fine-tune and leave a checkpoint."""
    model, tokenizer = load_policy(config.model, home=config.training.home())
    if config.sequence_length > model.config.max_position_embeddings:
        raise UserError(f"sequence_length {config.sequence_length} exceeds the model's context "
                        f"{model.config.max_position_embeddings}", "lower it")
    dialogs = read_dialogs(config)
    count = round(config.heldout * len(dialogs))
    training, heldout = (packed(tokenizer, some, config) for some in (dialogs[count:], dialogs[:count]))
    source = Rows(training.rows, lambda rows: collate(rows, config.sequence_length), batch_size=config.batch_size,
                  micro_batch_size=config.micro_batch_size, epochs=config.epochs, seed=config.seed)
    learner = train(run, model, source, next_token, config.training.with_steps(source.steps),
                    save_model=saver(model, tokenizer), title="sft",
                    validate=hooks.Validate(Validation(heldout, config)),
                    flops_per_token=flops_per_token(model.config, config.sequence_length))
    run.write_json("summary.json", {
        "parameters": model.config.parameters(), "steps": learner.step, "dialogs": len(dialogs) - count,
        "tokens": learner.step * config.batch_size * config.sequence_length, "cut": training.cut,
        "dropped": training.dropped, "fill": round(training.fill, 4), "validation": validated(run)})


def read_dialogs(config: Config) -> list[Dialog]:
    """All dialogs by their weights, in a random order."""
    generator = np.random.default_rng(config.seed)
    chosen: list[Dialog] = []
    for source in config.dialogs.values():
        dialogs = list(records.read(Dialog, source.path, may_be_empty=is_output(source.path)))
        whole, part = divmod(source.weight, 1)
        chosen += dialogs * int(whole)
        chosen += [dialogs[index] for index in generator.permutation(len(dialogs))[: round(part * len(dialogs))]]
    return [chosen[index] for index in generator.permutation(len(chosen))]


def packed(tokenizer: Tokenizer, dialogs: list[Dialog], config: Config) -> Packed:
    """Dialogs as rows."""
    return pack((encode_dialog(tokenizer, one.messages, one.train) for one in dialogs), config.sequence_length)


class Validation:
    """Loss on the answers of held-out dialogs."""

    def __init__(self, heldout: Packed, config: Config) -> None:
        self.rows, self.config = heldout.rows, config

    def __call__(self, model: nn.Module) -> dict[str, float]:
        nats, tokens = heldout_loss(model, self.rows, lambda rows: collate(rows, self.config.sequence_length),
                                    self.config.micro_batch_size)
        return {"validation/loss": nats / tokens} if tokens else {}
