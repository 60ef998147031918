"""Reward models (§3.2.2): ranking loss with a margin by degree; the safety model adds an auxiliary loss.

Two recipes make the two models. Data mixes of the paper: the helpfulness model takes all helpfulness comparisons and
as many again drawn from the rest; the safety model 90 % safety and 10 % helpfulness. One epoch: more overfits. The
paper's best model starts from a chat checkpoint and does not say which margin it used; `small` is the default.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from pydantic import Field

from llama2 import records
from llama2.config import Config as Section
from llama2.config import StageConfig
from llama2.data.loader import Batch, Rows
from llama2.errors import UserError
from llama2.evaluate.winrate import wilson
from llama2.generate.score import rewards
from llama2.mesh import Precision
from llama2.model.scorer import Scorer
from llama2.records import DEGREES, Axis, Message, Preference
from llama2.runs import Run, is_output
from llama2.stages.planning import UNKNOWN, Cluster, Lineage, Tower, flops_per_token, training_plan
from llama2.stages.training import Training, load_scorer, saver, train
from llama2.tokenizer.template import encode_dialog
from llama2.tokenizer.tokenizer import Tokenizer
from llama2.train.loop import Plan
from llama2.train.objectives import Margins, ranking
from llama2.train.optim import AdamW


class Comparisons(Section):
    """One set of comparisons."""

    incidental: ClassVar[frozenset[str]] = frozenset({"license"})

    path: Path
    """JSONL of preferences"""
    axis: Axis | None = None
    """take only those made on this axis"""
    share: float | None = Field(None, gt=0, le=1)
    """of all training pairs; without it every pair is taken once"""
    license: str | None = None
    """its licence, for the papers of a release; nothing depends on it"""


class Config(StageConfig):
    """Train a reward model."""

    model: Path
    """a chat checkpoint (its head is replaced by a fresh scalar head), or a reward model to go on with"""
    preferences: Annotated[dict[str, Comparisons], Field(min_length=1)]
    """name -> comparisons to learn from"""
    heldout: dict[str, Comparisons] = {}
    """name -> comparisons to measure accuracy on"""
    margins: Margins = "small"
    """none; small: 1, 2/3, 1/3, 0; large: 3, 2, 1, 0 (Table 27)"""
    auxiliary_weight: float = Field(0.0, ge=0)
    """of the safety auxiliary loss; above 0 for a safety model"""
    max_tokens: int = Field(4096, gt=1)
    """longer conversations are left out and counted"""
    batch_size: int = Field(512, gt=0)
    """pairs in an optimizer step, over all ranks"""
    micro_batch_size: int = Field(8, gt=0)
    """pairs a rank computes at a time"""
    epochs: int = Field(1, gt=0)
    training: Training = Training(optimizer=AdamW(learning_rate=1e-5), plan=Plan(save_every=200))
    """warm-up is 3 % of the steps, at least 5, unless plan.warmup_steps says otherwise"""


@dataclass(frozen=True)
class Pair:
    """A comparison in token ids: what was preferred, what was not, how clearly, and which answers are safe."""

    chosen: list[int]
    rejected: list[int]
    degree: int
    safe: tuple[int, int]

    @property
    def size(self) -> int:
        return max(len(self.chosen), len(self.rejected))


def plan(config: Config, cluster: Cluster, lineage: Lineage) -> dict[str, Any]:
    """Parameters and memory, every answer as long as max_tokens allows; steps are known once the data is read."""
    shape = lineage.inherit(config.out, config.model)
    if shape is None:
        return UNKNOWN
    return training_plan([Tower(shape, scalar=True)], config.training, cluster, rows=2 * config.batch_size,
                         micro_rows=2 * config.micro_batch_size,
                         length=min(config.max_tokens, shape.max_position_embeddings),
                         steps=config.training.plan.max_steps)


def run(config: Config, run: Run) -> None:
    """Train, measure accuracy by set and degree, and leave a reward-model checkpoint."""
    scorer, tokenizer = load_scorer(config.model, seed=config.seed, home=config.training.home())
    longest = min(config.max_tokens, scorer.config.max_position_embeddings)
    pairs, skipped = mixed(config, tokenizer, longest)
    source = Rows(pairs, collate, batch_size=config.batch_size, micro_batch_size=config.micro_batch_size,
                  epochs=config.epochs, seed=config.seed, size=lambda pair: pair.size)
    heldout = {name: encode(tokenizer, select(comparisons), longest)[0] for name, comparisons in config.heldout.items()}
    steps = min(config.training.plan.max_steps or source.steps, source.steps)
    settings = config.training.with_steps(source.steps, warmup(config.training.plan, steps))
    learner = train(run, scorer, source, ranking(config.margins, config.auxiliary_weight), settings,
                    save_model=saver(scorer, tokenizer), title="reward",
                    flops_per_token=flops_per_token(scorer.config, 128))
    scorer.eval()
    measured = {name: accuracy(scorer, pairs, settings.precision) for name, pairs in heldout.items() if pairs}
    run.write_json("accuracy.json", {"sets": measured})
    run.write_json("summary.json", {"pairs": len(pairs), "too long": skipped, "steps": learner.step,
                                    "parameters": scorer.config.parameters()})


def warmup(plan: Plan, steps: int) -> int:
    """The paper's 3 % of the steps and at least 5, as far as there are steps for it, unless the plan says otherwise."""
    return min(max(5, round(0.03 * steps)), steps - 1) if plan.warmup_steps is None else plan.warmup_steps


def select(comparisons: Comparisons) -> list[Preference]:
    """The preferences of a set, of its axis alone."""
    found = records.read(Preference, comparisons.path, may_be_empty=is_output(comparisons.path))
    return [one for one in found if comparisons.axis in (None, one.axis)]


def encode(tokenizer: Tokenizer, preferences: Sequence[Preference], longest: int) -> tuple[list[Pair], int]:
    """Preferences as pairs of token rows, and how many were too long."""
    pairs = []
    for one in preferences:
        rows = [encode_dialog(tokenizer, (*one.prompt, Message("assistant", answer.text)))[0]
                for answer in (one.chosen, one.rejected)]
        if max(map(len, rows)) <= longest:
            safe = tuple(-1 if known is None else int(known) for known in (one.chosen_safe, one.rejected_safe))
            pairs.append(Pair(rows[0], rows[1], DEGREES.index(one.degree), (safe[0], safe[1])))
    return pairs, len(preferences) - len(pairs)


def mixed(config: Config, tokenizer: Tokenizer, longest: int) -> tuple[list[Pair], int]:
    """All training pairs: sets without a share whole, the others drawn until they make up their shares."""
    sets = {name: encode(tokenizer, select(one), longest) for name, one in config.preferences.items()}
    skipped = sum(count for _, count in sets.values())
    shares = {name: one.share for name, one in config.preferences.items() if one.share is not None}
    pairs = [pair for name, (found, _) in sets.items() if name not in shares for pair in found]
    rest = 1 - sum(shares.values())
    whole = [name for name in sets if name not in shares]
    if whole and rest < 1e-9:
        raise UserError(f"the shares add up to {1 - rest:g}, which leaves nothing for: {', '.join(whole)}",
                        "lower them")
    total = len(pairs) / rest if whole else min(len(sets[name][0]) / share for name, share in shares.items())
    generator = np.random.default_rng(config.seed)
    for name, share in shares.items():
        found = sets[name][0]
        order = generator.permutation(len(found))[: round(share * total)]
        pairs += [found[index] for index in order]
    return pairs, skipped


def collate(pairs: Sequence[Pair]) -> Batch:
    """Pairs as one right-padded batch, the chosen rows first (see `objectives.ranking`)."""
    rows = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    tokens_BT = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for index, row in enumerate(rows):
        tokens_BT[index, : len(row)] = torch.tensor(row)
    return {"tokens_BT": tokens_BT, "lengths_B": torch.tensor([len(row) for row in rows]),
            "degrees_P": torch.tensor([pair.degree for pair in pairs]), "weights_P": torch.ones(len(pairs)),
            "safe_B": torch.tensor([pair.safe[0] for pair in pairs] + [pair.safe[1] for pair in pairs])}


def accuracy(scorer: Scorer, pairs: Sequence[Pair], precision: Precision) -> dict[str, dict[str, float]]:
    """Share of pairs whose preferred answer scores higher (a tie counts half), in all and by degree (Table 8)."""
    scores = rewards(scorer, [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs], precision)
    right = [0.5 * (1 + np.sign(a - b)) for a, b in zip(scores[: len(pairs)], scores[len(pairs):])]
    groups: Mapping[str, list[float]] = {
        "all": right, **{degree: [r for r, pair in zip(right, pairs) if pair.degree == index]
                         for index, degree in enumerate(DEGREES)}}
    return {name: {"accuracy": sum(group) / len(group), "n": len(group), **_interval(sum(group), len(group))}
            for name, group in groups.items() if group}


def _interval(right: float, count: int) -> dict[str, float]:
    low, high = wilson(right, count)
    return {"low": low, "high": high}
