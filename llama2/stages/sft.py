"""Supervised fine-tuning (§3.1): dialogs packed into full rows, loss on the assistant's tokens
only, two epochs.

The paper's cosine starts at 2e-5 with batches of 64 rows of 4096 tokens. It does not state warm-up
(none here) or whether attention crosses packed dialogs (it does not here). Rejection sampling,
Ghost Attention and context distillation all end in this stage, each with its own dialogs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import Field
from torch import nn

from llama2 import records
from llama2.config import Config as Section
from llama2.config import StageConfig
from llama2.data.loader import Rows
from llama2.data.pack import Packed, Segment, collate, cut_segment, pack
from llama2.data.split import choose_heldout, normalize_opening
from llama2.model.llama import Llama
from llama2.ranks import Ranks
from llama2.records import Dialog, mask_turns
from llama2.results import ReadCounts, SftResult
from llama2.runs import Run, is_output
from llama2.stages.common import cautions
from llama2.stages.common.memory import Tower, flops_per_token
from llama2.stages.common.planning import UNKNOWN, Cluster, PlannedRuns, plan_training
from llama2.stages.common.training import (
    Training,
    check_left,
    heldout_loss,
    last_validation,
    load_policy,
    make_saver,
    row_length,
    train,
)
from llama2.tally import Tally
from llama2.tokenizer.template import (
    CHAT_TEMPLATE,
    TemplateName,
    check_template,
    choose_template,
    encode_cut,
    encode_dialog,
    encode_prompt,
    find_ends,
)
from llama2.tokenizer.tokenizer import Tokenizer
from llama2.train import hooks
from llama2.train.learner import Learner
from llama2.train.loop import Plan
from llama2.train.objectives import next_token
from llama2.train.optim import AdamW

TOO_LONG = "no answer within a row"
FILL = 0.5
"""rows with less than this share of their places filled are mostly padding"""


@dataclass(frozen=True)
class Encoded:
    """Dialogs as segments."""

    segments: list[Segment]
    longest: int
    """places that the longest dialog takes, uncut"""


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
    chat_template: TemplateName | Path | None = None
    """teach this format: a name, or a file of Jinja; empty: the model's own, Llama 2's where it has
    none"""
    dialogs: Annotated[dict[str, Dialogs], Field(min_length=1)]
    """name -> dialogs; they are mixed"""
    sequence_length: int = Field(4096, gt=1)
    batch_size: int = Field(64, gt=0)
    """rows of sequence_length tokens in an optimizer step, over all ranks"""
    micro_batch_size: int = Field(4, gt=0)
    epochs: int = Field(2, gt=0)
    heldout: float = Field(0.02, ge=0, lt=1)
    """share of conversations kept for validation; by how they open, so that none of their copies is
    trained on"""
    heldout_dialogs: Path | None = None
    """dialogs to validate on instead of a share (`llama2 prepare` writes heldout-dialogs.jsonl);
    conversations that open like one of these are not trained on"""
    training: Training = Training(optimizer=AdamW(learning_rate=2e-5), plan=Plan(save_every=200))


def plan(config: Config, cluster: Cluster, planned: PlannedRuns) -> dict[str, Any]:
    """Return parameters and memory; steps are known once the data is read."""
    shape = planned.inherit(config.out, config.model)
    if shape is None:
        return UNKNOWN

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
    """Fine-tune and leave a checkpoint."""
    home = config.training.home(run.ranks)
    model, tokenizer = load_policy(config.model, home)
    tokenizer = choose_format(config, tokenizer)
    context = model.config.max_position_embeddings
    length = row_length(config.sequence_length, context)

    dialogs, heldout = read_dialogs(config, run)
    sets = {}
    for name, of_set in dialogs.items():
        sets[name] = encode(tokenizer, of_set, length, context, run.tally(f"dialogs.{name}"))

    segments = mix(config, sets, run)
    check_left(run, "dialogs.")
    validation = encode(tokenizer, heldout, length, context, run.tally("held out")).segments
    packed = pack(segments, length)
    source = Rows(
        packed.rows,
        lambda rows: collate(rows, length),
        run.ranks,
        batch_size=config.batch_size,
        micro_batch_size=config.micro_batch_size,
        epochs=config.epochs,
        seed=config.seed,
    )
    settings = config.training.with_steps(source.steps)
    for line in (
        *cautions.warn_of_length(
            config.training.plan,
            source.steps,
            len(packed.rows),
            "row",
            config.batch_size,
            config.epochs,
        ),
        *warn_of_data(config, packed, segments, sets, tokenizer, context),
        *warn_of_sets(config, run, len(validation)),
    ):
        run.warn(line)

    validate = None
    if validation:
        validate = hooks.Validate(DialogValidation(pack(validation, length), config, run.ranks))

    learner = train(
        run,
        model,
        source,
        next_token,
        settings,
        save_model=make_saver(model, tokenizer, run.ranks),
        title="sft",
        validate=validate,
        flops_per_token=flops_per_token(
            model.config, length, frozen_layers=config.training.frozen_layers
        ),
    )
    conclude(run, model, learner, packed, list(sets), len(validation))


def conclude(
    run: Run, model: Llama, learner: Learner, packed: Packed, names: Sequence[str], heldout: int
) -> None:
    """Write the result, and say what was read and measured."""
    tallies = {name: run.tally(f"dialogs.{name}") for name in names}
    dialogs = sum(tally.kept for tally in tallies.values())
    cut = sum(tally.cut for tally in tallies.values())
    dropped = sum(tally.skipped[TOO_LONG] for tally in tallies.values())
    validation = last_validation(run)
    run.write_result(
        SftResult(
            parameters=model.config.parameters(),
            steps=learner.step,
            dialogs=dialogs,
            heldout=heldout,
            tokens=learner.tokens,
            trained=learner.trained,
            cut=cut,
            dropped=dropped,
            fill=round(packed.fill, 4),
            validation=validation,
            sources={name: ReadCounts.of(tally) for name, tally in tallies.items()},
        )
    )
    loss = "no validation"
    if validation is not None:
        loss = f"validation loss {validation.loss:.4f} ({heldout:,} held out)"

    run.conclude(f"{learner.tokens:,} tokens read, {learner.trained:,} of them learnt; {loss}")


def choose_format(config: Config, tokenizer: Tokenizer) -> Tokenizer:
    """Return the tokenizer with the chat template that is taught: the one asked for, else the
    model's, else Llama 2's. UserError for one that cannot be used."""
    if config.chat_template is not None:
        template, place = choose_template(str(config.chat_template))
        tokenizer = tokenizer.with_chat_template(template, tokenizer.stops, place)
    elif tokenizer.template is None:
        tokenizer = tokenizer.with_chat_template(CHAT_TEMPLATE)

    check_template(config.model, tokenizer)
    return tokenizer


# --- reading ---
def read_dialogs(config: Config, run: Run) -> tuple[dict[str, list[Dialog]], list[Dialog]]:
    """Return the dialogs to train on, set by set, and those held out, without copies.

    What is held out is chosen over all sets by how a conversation opens, before weights: none of it
    is trained on.
    """
    sets = {}
    for name, source in config.dialogs.items():
        sets[name] = read_useful(source.path, run.tally(f"dialogs.{name}"))

    heldout: list[Dialog] = []
    tally = run.tally("held out")
    if config.heldout_dialogs is not None:
        heldout = read_useful(config.heldout_dialogs, tally)
        openings = {find_opening(dialog) for dialog in heldout}
    else:
        every = chain.from_iterable(sets.values())
        openings = choose_heldout([find_opening(dialog) for dialog in every], config.heldout)

    training: dict[str, list[Dialog]] = {}
    for name, dialogs in sets.items():
        same: list[Dialog] = []
        training[name] = []
        for dialog in dialogs:
            (same if find_opening(dialog) in openings else training[name]).append(dialog)

        run.tally(f"dialogs.{name}").skip("held out", count=len(same))
        if config.heldout_dialogs is None:
            heldout += same
            tally.read += len(same)

    different = list({dialog.messages: dialog for dialog in heldout}.values())
    tally.skip("duplicate", count=len(heldout) - len(different))
    return training, different


def find_opening(dialog: Dialog) -> str:
    """Find how a conversation opens, whatever lasting instruction stands before it."""
    return normalize_opening(dialog.messages, str(dialog.metadata.get("instruction") or ""))


def read_useful(path: Path, tally: Tally) -> list[Dialog]:
    """Read the dialogs of a file that something can be learnt from; the others are counted."""
    dialogs = []
    for dialog in records.read(Dialog, path, may_be_empty=is_output(path)):
        tally.read += 1
        reason = explain_useless(dialog)
        if reason:
            tally.skip(reason)
        else:
            dialogs.append(dialog)

    return dialogs


def explain_useless(dialog: Dialog) -> str:
    """Say why nothing is to be learnt from a dialog: silence, or no answer that carries loss; an
    empty text for a useful one."""
    answers = [message for message in dialog.messages if message.role == "assistant"]
    questions = [message for message in dialog.messages if message.role == "user"]
    flags = mask_turns(dialog.messages, dialog.train)
    trained = [answer for answer, flag in zip(answers, flags, strict=True) if flag]
    if not trained:
        return "no answer to learn"
    if not all(message.content.strip() for message in trained):
        return "empty answer"
    if not all(message.content.strip() for message in questions):
        return "empty user turn"

    return ""


# --- encoding ---
def encode(
    tokenizer: Tokenizer, dialogs: Sequence[Dialog], length: int, context: int, tally: Tally
) -> Encoded:
    """Encode dialogs as segments of at most `length` places; those without an answer in what fits
    are left out and counted."""
    segments: list[Segment] = []
    longest = 0
    for dialog in dialogs:
        ids, mask = encode_for_training(tokenizer, dialog)
        segment = cut_segment(ids, mask, length)
        longest = max(longest, len(ids) - 1)

        if segment is not None:
            segments.append(segment)
            tally.cut += len(ids) > length + 1

    if len(segments) < len(dialogs):
        cure = suggest_length(longest, length, context)
        tally.skip(TOO_LONG, cure, len(dialogs) - len(segments))

    tally.kept += len(segments)
    return Encoded(segments, longest)


def encode_for_training(tokenizer: Tokenizer, dialog: Dialog) -> tuple[list[int], list[bool]]:
    """Return the ids of a dialog and the mask of those to be learnt. An answer that sampling cut
    off has no end to be learnt."""
    ids, mask = encode_dialog(tokenizer, dialog.messages, dialog.train)
    if dialog.metadata.get("cut") is not True:
        return ids, mask

    prompt = len(encode_prompt(tokenizer, dialog.messages[:-1]))
    ids = encode_cut(tokenizer, dialog.messages)
    return ids, [*mask[:prompt], *(mask[prompt : prompt + 1] * (len(ids) - prompt))]


def suggest_length(longest: int, length: int, context: int) -> str:
    """Suggest what would keep dialogs of up to `longest` tokens whole, or more of them."""
    if longest <= context:
        return f"--sequence-length {longest} holds the longest"

    most = "--sequence-length is at its most"
    if length < context:
        most = f"--sequence-length {context} is the most"

    return f"{most} in the model's context, the longest has {longest:,} tokens"


def mix(config: Config, sets: Mapping[str, Encoded], run: Run) -> list[Segment]:
    """Mix all sets by their weights, in a random order."""
    generator = np.random.default_rng(config.seed)
    mixed: list[Segment] = []
    for name, encoded in sets.items():
        segments, weight = encoded.segments, config.dialogs[name].weight
        times, part = divmod(weight, 1)
        drawn = generator.permutation(len(segments))[: round(part * len(segments))]
        mixed += segments * int(times)
        mixed += [segments[index] for index in drawn]

        if weight < 1 and segments:
            tally = run.tally(f"dialogs.{name}")
            tally.kept = len(drawn)
            tally.skip(
                f"not drawn at weight {weight:g}",
                f"raise --dialogs.{name}.weight",
                len(segments) - len(drawn),
            )

    return [mixed[index] for index in generator.permutation(len(mixed))]


# --- cautions ---
def warn_of_data(
    config: Config,
    packed: Packed,
    segments: Sequence[Segment],
    sets: Mapping[str, Encoded],
    tokenizer: Tokenizer,
    context: int,
) -> Iterator[str]:
    """Caution about rows: answers without an end, and places without tokens."""
    longest = max(encoded.longest for encoded in sets.values())
    end = find_ends(tokenizer)[0]
    if not any((segment.mask & (segment.ids == end)).any() for segment in segments):
        yield (
            f"all answers are cut off at {config.sequence_length} tokens, so the model does not "
            f"learn to end one; {suggest_length(longest, config.sequence_length, context)}"
        )

    if packed.fill < FILL and longest < config.sequence_length:
        yield (
            f"{1 - packed.fill:.0%} of the places in a row are padding, computed for nothing; "
            f"--sequence-length {longest} holds the longest dialog"
        )


def warn_of_sets(config: Config, run: Run, heldout: int) -> Iterator[str]:
    """Caution about sets that give nothing, and about having nothing to validate on."""
    for name in config.dialogs:
        tally = run.tally(f"dialogs.{name}")
        if tally.read and not tally.kept:
            yield f"dialogs.{name} gives nothing to train on: {tally.line()}"

    if not heldout and (config.heldout or config.heldout_dialogs):
        yield (
            "no dialog is held out, so there is no validation loss; give --heldout-dialogs FILE, "
            "or more conversations that open differently"
        )


class DialogValidation:
    """Loss on the answers of held-out dialogs."""

    def __init__(self, heldout: Packed, config: Config, ranks: Ranks) -> None:
        self.rows, self.config, self.ranks = heldout.rows, config, ranks

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """Return nats a token."""
        nats, tokens = heldout_loss(
            model,
            self.rows,
            lambda rows: collate(rows, self.config.sequence_length),
            self.config.micro_batch_size,
            self.ranks,
        )
        return {"validation/loss": nats / tokens}
