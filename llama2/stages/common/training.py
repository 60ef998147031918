"""The parts that all training stages share: its settings, the hooks around `fit`, and the
checkpoint it leaves behind.

A stage hands over a model, a source and an objective; this module applies the parallelism, resumes,
logs, validates, saves, and leaves a Hugging Face model directory with its tokenizer in the run
directory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Literal, TypeVar

import torch
from pydantic import Field
from torch import nn

from llama2 import devices
from llama2.batches import Batch, move
from llama2.config import Config
from llama2.data.loader import Rows
from llama2.devices import Precision
from llama2.errors import UserError
from llama2.formats import checkpoint
from llama2.model.llama import Llama, Trunk
from llama2.model.scorer import Scorer
from llama2.ranks import Ranks
from llama2.results import HeldoutLoss
from llama2.runs import Run, read_metrics
from llama2.stages.common import cautions
from llama2.tokenizer.template import CHAT_TEMPLATE, find_ends, has_same_format
from llama2.tokenizer.tokenizer import Tokenizer
from llama2.train import hooks, optim, parallel, state
from llama2.train.learner import Learner
from llama2.train.loop import BatchSource, Hook, Objective, Plan, fit
from llama2.train.objectives import next_token

Item = TypeVar("Item")


class Training(Config):
    """Settings of training, the same for every stage."""

    optimizer: optim.AdamW = optim.AdamW()
    plan: Plan = Plan()
    precision: Precision = "bf16"
    """bf16: matrix products in bf16 over fp32 weights"""
    compile: bool = False
    """torch.compile the model: for GPUs; on a CPU our own kernels are faster, and compiling turns
    them off"""
    parallel: Literal["replicate", "shard"] = "replicate"
    """under several ranks: a copy of the model on each, or one model spread over all (FSDP2)"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass: less memory, a third more work"""
    frozen_layers: int = Field(0, ge=0)
    """of each network, the embeddings and so many of the layers above them stay as they are: with
    half of them a step takes two thirds of the work, and less memory"""
    tensorboard: bool = False

    def home(self, ranks: Ranks) -> torch.device:
        """Return the device onto which a model to be trained is loaded: the rank's, or, if the
        model is to be spread, rank 0's memory alone."""
        if self.parallel == "shard" and ranks.size > 1:
            return torch.device(devices.CPU if ranks.is_main else "meta")

        return ranks.device

    def with_steps(self, steps: int, **changes: int) -> Training:
        """Return the same settings for a source of `steps` optimizer steps, or for max_steps where
        that is less, with `changes` of the plan; UserError where warm-up leaves nothing of the
        schedule."""
        limit = steps if self.plan.max_steps is None else self.plan.max_steps
        plan = self.plan.model_copy(update={**changes, "max_steps": min(limit, steps)})
        plan.check()

        return self.model_copy(update={"plan": plan})


def train(
    run: Run,
    model: nn.Module,
    source: BatchSource,
    objective: Objective,
    settings: Training,
    *,
    save_model: Callable[[Path], None],
    title: str,
    extra: Sequence[Hook] = (),
    validate: hooks.Validate | None = None,
    flops_per_token: float = 0.0,
    rates: Mapping[str, float] | None = None,
    apart: Sequence[str] = (),
    derive: Sequence[hooks.Derive] = (),
) -> Learner:
    """Fit `model` inside a run directory, resuming what is there, and write the final model with
    `save_model`."""
    for line in cautions.warn_of_schedule(settings.plan):
        run.warn(line)

    ranks = distribute(model, run.ranks, settings)
    learner = Learner(
        model,
        ranks,
        settings.optimizer,
        rates=rates,
        apart=apart,
        precision=settings.precision,
        compile=settings.compile,
    )
    if state.find_latest(run.path) is None:
        run.rewind(-1)  # a first attempt may have been killed before its first checkpoint

    # Checkpoint restores the others before they start
    watchers: list[Hook] = [
        hooks.Checkpoint(run.path, None, run.rewind),
        hooks.Log(run.log, flops_per_token, derive),
        hooks.ProgressBar(title, flops_per_token),
        *extra,
    ]
    if validate is not None:
        watchers.append(validate)

    if settings.tensorboard:
        watchers.append(hooks.TensorBoard(run.path / "tensorboard", ranks))

    watchers.append(hooks.Signals())
    fit(learner, source, objective, settings.plan, watchers)
    save_model(run.path)
    ranks.barrier()

    return learner


def distribute(model: nn.Module, ranks: Ranks, settings: Training) -> Ranks:
    """Spread `model` over the ranks, or copy it to each; return the ranks with the axis it took."""
    for module in model.modules():
        if isinstance(module, Trunk):
            module.gradient_checkpointing = settings.gradient_checkpointing
            freeze_lower(module, settings.frozen_layers)

    if settings.parallel == "replicate":
        parallel.replicate(model.to(ranks.device), ranks)
        return ranks

    ranks = ranks.spread()
    parallel.shard(model, ranks, settings.precision)
    return ranks


def freeze_lower(trunk: Trunk, layers: int) -> None:
    """Leave the embeddings and the lowest `layers` of a network as they are; a head that is tied
    to the embeddings stays with them. UserError where nothing would be left."""
    if layers >= len(trunk.layers):
        raise UserError(
            f"frozen_layers {layers} leaves none of the model's {len(trunk.layers)} layers to "
            "train",
            "lower --training.frozen-layers",
        )

    if layers:
        trunk.embed_tokens.requires_grad_(False)
        for layer in trunk.layers[:layers]:
            layer.requires_grad_(False)


def heldout_loss(
    model: nn.Module,
    rows: Sequence[Item],
    collate: Callable[[Sequence[Item]], Batch],
    micro_batch_size: int,
    ranks: Ranks,
) -> tuple[float, float]:
    """Return the cross-entropy in nats summed over `rows`, shared between ranks, and the tokens it
    sums over.

    Every rank makes the same number of forward passes: a sharded model gathers its weights in each
    of them.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=ranks.device)
    if rows:
        source = Rows(
            rows,
            collate,
            ranks,
            batch_size=micro_batch_size * ranks.data.size,
            micro_batch_size=micro_batch_size,
            shuffle=False,
        )
        for batch in chain.from_iterable(source):
            loss = next_token(model, move(batch, ranks.device))
            sums += torch.stack([loss.total.double(), loss.weight.double()])

    nats, tokens = ranks.all_sum(sums).tolist()
    return nats, tokens


def row_length(asked: int, context: int) -> int:
    """Return the places of a row, `asked` for; UserError if the model's context is shorter."""
    if asked > context:
        raise UserError(
            f"sequence_length {asked} exceeds the model's context {context}",
            f"give --sequence-length {context} or less",
        )

    return asked


def check_left(run: Run, prefix: str) -> None:
    """Raise UserError with all counts where nothing is left of the sets whose tally begins with
    `prefix`."""
    tallies = {name: tally for name, tally in run.tallies.items() if name.startswith(prefix)}
    if not any(tally.kept for tally in tallies.values()):
        counts = "; ".join(f"{name}: {tally.line()}" for name, tally in tallies.items())
        raise UserError(
            f"nothing is left to train on: {counts}", "mend the data, or what leaves it out"
        )


def last_validation(run: Run) -> HeldoutLoss | None:
    """Return what the last validation measured, even if that was before an interruption."""
    rows = [row for row in read_metrics(run.path) if "validation/loss" in row]
    return HeldoutLoss.model_validate(rows[-1]) if rows else None


def make_saver(
    model: Llama | Scorer, tokenizer: Tokenizer, ranks: Ranks, *, taught: bool = True
) -> Callable[[Path], None]:
    """Return a function that writes `model` and its tokenizer as a Hugging Face directory (every
    rank calls it).

    The tokenizer's chat template stays. If it has none, and conversations were `taught`, that is
    Llama 2's. Answers end at every id at which they did, and at the one that is taught.
    """
    beside = tokenizer
    if taught and tokenizer.template is None:
        beside = tokenizer.with_chat_template(CHAT_TEMPLATE)

    ends = find_ends(beside) if taught else tokenizer.stops
    stops = tuple(dict.fromkeys((*model.config.stops, *tokenizer.stops, *ends)))

    def save(directory: Path) -> None:
        weights = parallel.gather_weights(model)
        if ranks.is_main:
            checkpoint.save_tensors(
                weights,
                replace(model.config, eos_token_id=stops),
                directory,
                scorer=isinstance(model, Scorer),
            )
            beside.save(directory)

    return save


def load_policy(
    path: Path, home: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[Llama, Tokenizer]:
    """Load a language model onto the device `home`, and the tokenizer beside it."""
    tokenizer = checkpoint.load_tokenizer(path)
    return checkpoint.load(path, dtype=dtype, device=home), tokenizer


def load_scorer(
    path: Path, home: torch.device, tokenizer: Tokenizer | None = None, seed: int = 0
) -> tuple[Scorer, Tokenizer]:
    """Load a reward model (or a language model given a fresh scalar head), and the tokenizer beside
    it.

    With `tokenizer`, refuses a reward model whose tokenizer is another one: its scores would mean
    nothing.
    """
    judge_tokenizer = checkpoint.load_tokenizer(path)
    if tokenizer is not None and not judge_tokenizer.is_same(tokenizer):
        raise UserError(
            f"{path}: its tokenizer is not the policy's",
            "train policy and reward models on one tokenizer",
        )
    if tokenizer is not None and not has_same_format(judge_tokenizer, tokenizer):
        raise UserError(
            f"{path}: its chat template is not the policy's",
            "train policy and reward models on one chat format (sft has --chat-template)",
        )

    return checkpoint.load_scorer(
        path, dtype=torch.float32, device=home, seed=seed
    ), judge_tokenizer


N = TypeVar("N", bound=nn.Module)


def freeze(model: N, precision: Precision) -> N:
    """Make a model one that is only read. Under bf16 autocast its matrices are kept in bf16: half
    the memory, the same results, because autocast would round them before every product. Norms,
    embeddings and a scalar head stay in fp32."""
    model.eval().requires_grad_(False)
    if precision == "bf16":
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and name != "score":
                module.to(torch.bfloat16)

    return model
