"""Pretraining (§2.2): next-token prediction on packed shards, AdamW, cosine to a tenth, 4M tokens a
step.

The paper does not state initialisation, precision or whether attention crosses documents; here: see
`model/llama.py`, bf16 over fp32 weights, and it does not.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import nn

from llama2 import devices
from llama2.batches import Batch
from llama2.config import Config as Section
from llama2.config import StageConfig
from llama2.data.compress import HeldoutText
from llama2.data.loader import Rows
from llama2.data.mix import Mixture, mix, mix_passes
from llama2.data.pack import TextRows, collate
from llama2.data.shards import Shards, verify
from llama2.errors import UserError, did_you_mean
from llama2.formats import checkpoint
from llama2.model.llama import Llama, LlamaConfig
from llama2.model.sizes import SIZES
from llama2.ranks import Ranks
from llama2.results import PretrainResult
from llama2.runs import Run, completion
from llama2.stages.common import cautions
from llama2.stages.common.memory import Tower, flops_per_token
from llama2.stages.common.planning import UNKNOWN, Cluster, PlannedRuns, plan_training
from llama2.stages.common.training import (
    Training,
    heldout_loss,
    last_validation,
    make_saver,
    row_length,
    train,
)
from llama2.tokenizer.sentencepiece_model import require_fitting_size
from llama2.tokenizer.tokenizer import Tokenizer
from llama2.train import hooks
from llama2.train.loop import Plan
from llama2.train.objectives import next_token
from llama2.train.optim import AdamW


class Architecture(Section):
    """A model's shape where it differs from that of the named size; names are those of Hugging
    Face's config.json."""

    vocab_size: int | None = Field(None, gt=0)
    """the tokenizer's unless given"""
    hidden_size: int | None = Field(None, gt=0)
    intermediate_size: int | None = Field(None, gt=0)
    num_hidden_layers: int | None = Field(None, gt=0)
    num_attention_heads: int | None = Field(None, gt=0)
    num_key_value_heads: int | None = Field(None, gt=0)
    head_dim: int | None = Field(None, gt=0)
    """numbers of one head (hidden_size / num_attention_heads unless given)"""
    max_position_embeddings: int | None = Field(None, gt=0)
    """the longest context"""
    rms_norm_eps: float | None = Field(None, gt=0)
    rope_theta: float | None = Field(None, gt=0)
    tie_word_embeddings: bool | None = None


class Config(StageConfig):
    """Train a language model on token shards, from scratch or from a checkpoint."""

    shards: Path
    """a `llama2 tokenize` run"""
    size: str = "tiny"
    """a named size; its vocabulary becomes the tokenizer's"""
    architecture: Architecture = Architecture()
    """differences from the named size, in the words of config.json (num_hidden_layers: 6)"""
    model: Path | None = None
    """continue from this checkpoint instead of starting afresh"""
    sequence_length: int = Field(4096, gt=1)
    batch_size: int = Field(1024, gt=0)
    """rows of sequence_length tokens in an optimizer step, over all ranks (the paper: 4M tokens)"""
    micro_batch_size: int = Field(4, gt=0)
    """rows a rank computes at a time"""
    mixture: dict[str, float] = {}
    """source -> share of the tokens (any scale); without it every source is read as it is"""
    epochs: float = Field(1.0, gt=0)
    """tokens to train on, as a multiple of all tokens in the shards; training.plan.max_steps may
    end it earlier, and more steps than these tokens make are refused"""
    validation_rows: int = Field(256, gt=0)
    """rows of held-out text that loss and bits per byte are measured on"""
    training: Training = Training(
        optimizer=AdamW(learning_rate=3e-4),
        plan=Plan(warmup_steps=2000, validate_every=500, save_every=500),
    )


def architecture(config: Config, vocab_size: int | None) -> LlamaConfig:
    """Return the model's shape: the named size with the differences asked for."""
    if config.size not in SIZES:
        raise UserError(f"unknown size '{config.size}'", did_you_mean(config.size, SIZES))

    # not that of the named size, which would outlive another number of heads
    changes: dict[str, Any] = {"head_dim": 0}
    if vocab_size:
        changes["vocab_size"] = vocab_size

    changes |= config.architecture.model_dump(exclude_none=True)
    try:
        return dataclasses.replace(SIZES[config.size], **changes)
    except ValueError as error:
        raise UserError(f"architecture: {error}", "mend size or architecture") from None


def plan(config: Config, cluster: Cluster, planned: PlannedRuns) -> dict[str, Any]:
    """Return parameters, tokens, steps, FLOPs and memory, without data or weights."""
    if config.model:
        shape = planned.shape(config.model)
    else:
        shape = architecture(config, planned.vocabulary(config.shards))

    if shape is None:
        return UNKNOWN

    planned.shapes[config.out] = shape
    return plan_training(
        [Tower(shape)],
        config.training,
        cluster,
        rows=config.batch_size,
        micro_rows=config.micro_batch_size,
        length=config.sequence_length,
        steps=config.training.plan.max_steps,
        packed=True,
    )


def run(config: Config, run: Run) -> None:
    """Train, validate in bits per byte, and leave a checkpoint."""
    model, tokenizer = load_model(config, run.ranks)
    row_length(config.sequence_length, model.config.max_position_embeddings)
    rows, order = read_rows(config.shards / "train", tokenizer, config, run.ranks)
    source = Rows(
        rows,
        lambda items: collate(items, config.sequence_length),
        run.ranks,
        batch_size=config.batch_size,
        micro_batch_size=config.micro_batch_size,
        seed=config.seed,
    )
    check_length(config, rows, source.steps)
    settings = config.training.with_steps(source.steps)
    for line in warn_of_data(config, order, len(rows), source.steps):
        run.warn(line)

    validation = TextValidation(config, tokenizer, run.ranks)
    learner = train(
        run,
        model,
        source,
        next_token,
        settings,
        save_model=make_saver(model, tokenizer, run.ranks, taught=False),
        title="pretrain",
        validate=hooks.Validate(validation),
        flops_per_token=flops_per_token(
            model.config,
            config.sequence_length,
            frozen_layers=config.training.frozen_layers,
        ),
    )
    passes = {}
    for name, times in order.passes.items():
        passes[name] = round(times * learner.tokens / rows.places, 4)

    result = PretrainResult(
        parameters=model.config.parameters(),
        steps=learner.step,
        tokens=learner.tokens,
        trained=learner.trained,
        validation=last_validation(run),
        validation_bytes=validation.text.size,
        passes=passes,
        **validation.text.measure_bits_per_byte(),
    )
    run.write_result(result)

    if result.xz_bits_per_byte is not None:
        assert result.validation is not None
        run.conclude(
            f"{result.tokens:,} tokens read; {result.validation.bits_per_byte:.3f} bits per byte "
            f"on {result.validation_bytes:,} bytes of held-out text "
            f"(xz -9: {result.xz_bits_per_byte:.3f}, bzip2 -9: {result.bzip2_bits_per_byte:.3f})"
        )


def load_model(config: Config, ranks: Ranks) -> tuple[Llama, Tokenizer]:
    """Load the checkpoint to continue from, or make a fresh model; its tokenizer is the shards'."""
    tokenizer = Tokenizer.load(config.shards)
    home = config.training.home(ranks)
    if config.model:
        model = checkpoint.load(config.model, device=home)
        tokenizer.require_bos(config.model, model.config.bos_token_id)
        if tokenizer.is_byte_level:  # whose files do not list padding
            tokenizer = tokenizer.pad(model.config.vocab_size)

        tokenizer = tokenizer.with_chat_template(
            checkpoint.read_template(config.model), model.config.stops
        )
    else:
        with torch.device("meta" if home.type == "meta" else devices.CPU):
            model = Llama(architecture(config, tokenizer.vocab_size), config.seed)

    require_fitting_size(
        config.shards,
        tokenizer.vocab_size,
        model.config.vocab_size,
        "tokenize with the tokenizer of the model",
    )

    return model, tokenizer


def check_length(config: Config, rows: TextRows, steps: int) -> None:
    """Refuse a run that asks for more steps than its data makes: the schedule would be squeezed
    into fewer."""
    limit = config.training.plan.max_steps
    if limit is None or limit <= steps:
        return

    tokens = limit * config.batch_size * config.sequence_length
    epochs = math.ceil(1000 * config.epochs * tokens / rows.places) / 1000
    raise UserError(
        f"max_steps {limit:,} would read {tokens:,} tokens, epochs {config.epochs:g} of "
        f"{config.shards} are {rows.places:,}: {steps:,} steps",
        f"give --epochs {epochs:g} to read them that often, or --training.plan.max-steps {steps}",
    )


def warn_of_data(config: Config, order: Mixture, rows: int, steps: int) -> Iterator[str]:
    """Caution about what the data or the mixture makes of this run that its user may not expect."""
    for name, times in order.passes.items():
        if not times:
            yield f"the mixture gives '{name}' no share: none of it is read"

    if steps < cautions.FEW_UPDATES and config.training.plan.max_steps is None:
        cure = f"lower --batch-size to {max(rows // cautions.FEW_UPDATES, 1)}, or raise --epochs"
        yield cautions.describe_few_updates(steps, f"{rows:,} rows", cure)


def read_rows(
    directory: Path, tokenizer: Tokenizer, config: Config, ranks: Ranks
) -> tuple[TextRows, Mixture]:
    """Return documents of all sources in a random order, mixed by weight, as rows of
    `sequence_length` tokens; and the mixture.

    What the mixture orders are the documents that the rows are cut from. Training then shuffles the
    rows over the whole run, so the passes of a source that is read several times lie among one
    another.
    """
    folders = [path for path in sorted(directory.iterdir()) if path.is_dir()]
    shards = {path.name: Shards(path, tokenizer) for path in folders}
    if completion.find_run(directory) is None:  # no run vouches for them
        ranks.first(lambda: verify(shards.values()))

    lengths = {name: shard.lengths_N for name, shard in shards.items()}
    if config.mixture:
        total = sum(int(lengths_N.sum()) for lengths_N in lengths.values())
        weights = dict.fromkeys(lengths, 0.0) | config.mixture
        order = mix(lengths, weights, round(config.epochs * total), config.seed)
    else:
        order = mix_passes(lengths, dict.fromkeys(lengths, config.epochs), config.seed)

    stores = list(shards.values())
    return TextRows(stores, order.source_N, order.document_N, config.sequence_length), order


class TextValidation:
    """Loss and bits per byte on the first rows of held-out text: comparable between tokenizers, and
    with a compressor.

    Bits per byte: nats over all targets of these rows, EOS among them, in bits, over the bytes that
    the same targets spell.
    """

    def __init__(self, config: Config, tokenizer: Tokenizer, ranks: Ranks) -> None:
        every = config.model_copy(update={"mixture": {}, "epochs": 1.0, "seed": 0})
        self.rows, _ = read_rows(config.shards / "validation", tokenizer, every, ranks)
        self.few = range(min(len(self.rows), config.validation_rows))
        self.text = HeldoutText((self.rows[index] for index in self.few), tokenizer)
        self.config, self.ranks = config, ranks

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """Measure nats a token, and bits a byte where there is any."""
        nats, tokens = heldout_loss(
            model, self.few, self._collate, self.config.micro_batch_size, self.ranks
        )
        metrics = {"validation/loss": nats / max(tokens, 1)}
        if self.text.size:
            metrics["validation/bits_per_byte"] = nats / math.log(2) / self.text.size

        return metrics

    def _collate(self, indices: Sequence[int]) -> Batch:
        return collate([self.rows[index] for index in indices], self.config.sequence_length)
