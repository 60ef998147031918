"""Reward models (§3.2.2): ranking loss with a margin by degree; the safety model adds an auxiliary
loss.

Two recipes make the two models. Data mixes of the paper: the helpfulness model takes all
helpfulness comparisons and as many again drawn from the rest; the safety model 90 % safety and 10 %
helpfulness. One epoch: more overfits. The paper's best model starts from a chat checkpoint and does
not say which margin it used; `small` is the default.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
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
from llama2.data.split import opening
from llama2.devices import Precision
from llama2.evaluate.baselines import Answers, BagOfWords, by_length
from llama2.evaluate.winrate import wilson
from llama2.generate.score import score_rows
from llama2.importers.tables import digest
from llama2.model.scorer import Scorer
from llama2.ranks import Ranks
from llama2.records import DEGREES, Axis, Message, Preference
from llama2.runs import Run, is_output
from llama2.stages.common import cautions
from llama2.stages.common.planning import (
    UNKNOWN,
    Cluster,
    Lineage,
    Tower,
    flops_per_token,
    training_plan,
)
from llama2.stages.common.shares import total_pairs
from llama2.stages.common.training import Training, check_left, load_scorer, saver, train
from llama2.tally import Tally
from llama2.tokenizer.template import encode_dialog
from llama2.tokenizer.tokenizer import Tokenizer
from llama2.train.loop import Learner, Plan
from llama2.train.objectives import Margins, ranking
from llama2.train.optim import AdamW

TOO_LONG = "too long"


class Comparisons(Section):
    """One set of comparisons."""

    incidental: ClassVar[frozenset[str]] = frozenset({"license"})

    path: Path
    """JSONL of preferences"""
    axis: Axis | None = None
    """take only those made on this axis"""
    share: float | None = Field(None, gt=0, le=1)
    """of all training pairs, which must be reached; without it every pair is taken once"""
    repeat: bool = False
    """draw pairs more than once where there are too few for the share"""
    license: str | None = None
    """its licence, for the papers of a release; nothing depends on it"""


class Config(StageConfig):
    """Train a reward model."""

    model: Path
    """a chat checkpoint (its head is replaced by a fresh scalar head), or a reward model to go on
    with"""
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
    """A comparison in token ids: what was preferred, what was not, how clearly, and which answers
    are safe."""

    chosen: list[int]
    rejected: list[int]
    degree: int
    safe: tuple[int, int]
    axis: Axis = "helpful"
    texts: Answers = ("", "")
    conversation: int = 0
    """a digest of how it opens"""

    @property
    def size(self) -> int:
        return max(len(self.chosen), len(self.rejected))


def plan(config: Config, cluster: Cluster, lineage: Lineage) -> dict[str, Any]:
    """Parameters and memory, every answer as long as max_tokens allows; steps are known once the
    data is read."""
    shape = lineage.inherit(config.out, config.model)
    if shape is None:
        return UNKNOWN

    return training_plan(
        [Tower(shape, scalar=True)],
        config.training,
        cluster,
        rows=2 * config.batch_size,
        micro_rows=2 * config.micro_batch_size,
        length=min(config.max_tokens, shape.max_position_embeddings),
        steps=config.training.plan.max_steps,
    )


def run(config: Config, run: Run) -> None:
    """Train, measure accuracy by set and degree, and leave a reward-model checkpoint."""
    scorer, tokenizer = load_scorer(config.model, config.training.home(run.ranks), seed=config.seed)
    encoder = Encoder(tokenizer, config.max_tokens, scorer.config.max_position_embeddings)

    sets = mixed(config, encoder, run)
    pairs = [pair for found in sets.values() for pair in found]
    heldout = read_heldout(config, encoder, run)

    source = Rows(
        pairs,
        collate,
        run.ranks,
        batch_size=config.batch_size,
        micro_batch_size=config.micro_batch_size,
        epochs=config.epochs,
        seed=config.seed,
        size=lambda pair: pair.size,
    )
    limit = config.training.plan.max_steps
    steps = source.steps if limit is None else min(limit, source.steps)
    settings = config.training.with_steps(source.steps, warmup(config.training.plan, steps))

    for line in (
        *cautions.of_length(
            config.training.plan, source.steps, len(pairs), "pair", config.batch_size, config.epochs
        ),
        *of_sets(run, pairs, heldout),
        *of_labels(pairs, config.auxiliary_weight),
    ):
        run.warn(line)

    learner = train(
        run,
        scorer,
        source,
        ranking(config.margins, config.auxiliary_weight),
        settings,
        save_model=saver(scorer, tokenizer, run.ranks),
        title="reward",
        flops_per_token=flops_per_token(scorer.config, mean_length(pairs), scalar=True),
    )
    scorer.eval()
    measured = measure(scorer, pairs, heldout, settings.precision, run.ranks)
    conclude(run, scorer, learner, sets, measured)
    own = axis_of(pairs)

    # the last line stands for the run
    for name in sorted(measured, key=lambda name: axis_of(heldout[name]) == own):
        run.conclude(told(name, measured[name], {pair.axis for pair in heldout[name]}))
        for line in explained(name, measured[name]) if axis_of(heldout[name]) == own else ():
            run.warn(line)


def conclude(
    run: Run,
    scorer: Scorer,
    learner: Learner,
    sets: Mapping[str, Sequence[Pair]],
    measured: Mapping[str, Any],
) -> None:
    """Write accuracy.json and summary.json: what was trained on, by set, and what came of it."""
    total = sum(map(len, sets.values()))
    run.write_json("accuracy.json", {"sets": measured})
    run.write_json(
        "summary.json",
        {
            "pairs": total,
            "steps": learner.step,
            "parameters": scorer.config.parameters(),
            "tokens": learner.tokens,
            "trained": learner.trained,
            "sets": {
                name: {"pairs": len(found), "share": round(len(found) / total, 4)}
                for name, found in sets.items()
            },
            "read": {name: tally.summary() for name, tally in run.tallies.items()},
        },
    )

    if not measured:
        run.conclude(
            f"{total:,} pairs, {learner.tokens:,} tokens read; no held-out pairs to measure accuracy on"
        )


def read_heldout(config: Config, encoder: Encoder, run: Run) -> dict[str, list[Pair]]:
    """The pairs to measure accuracy on, of every set that has any."""
    heldout = {}
    for name, comparisons in config.heldout.items():
        tally = run.tally(f"heldout.{name}")
        heldout[name] = encoder.pairs(select(comparisons, tally), tally)

    return {name: found for name, found in heldout.items() if found}


def warmup(plan: Plan, steps: int) -> int:
    """The paper's 3 % of the steps and at least 5, as far as there are steps for it, unless the
    plan says otherwise."""
    return (
        min(max(5, round(0.03 * steps)), steps - 1)
        if plan.warmup_steps is None
        else plan.warmup_steps
    )


def mean_length(pairs: Sequence[Pair]) -> float:
    """Of the rows, each token counted once: what attention has to look back over, doubled."""
    lengths = [len(row) for pair in pairs for row in (pair.chosen, pair.rejected)]
    return sum(length * length for length in lengths) / sum(lengths)


def select(comparisons: Comparisons, tally: Tally) -> Iterator[Preference]:
    """The preferences of a set, of its axis alone."""
    for one in records.read(Preference, comparisons.path, may_be_empty=is_output(comparisons.path)):
        tally.read += 1
        if comparisons.axis in (None, one.axis):
            yield one
        else:
            tally.skip("of the other axis")


@dataclass(frozen=True)
class Encoder:
    """Preferences as pairs of token rows. Pairs that tell nothing, or are too long, are left out
    and counted."""

    tokenizer: Tokenizer
    max_tokens: int
    context: int

    def pairs(self, preferences: Iterable[Preference], tally: Tally) -> list[Pair]:
        """Both answers must say something, say different things, and fit in `max_tokens` and the
        model's context."""
        found = []
        longest = 0
        for one in preferences:
            pair = self.pair(one)
            if not all(answer.text.strip() for answer in one.responses):
                tally.skip("empty answer")
            elif pair.chosen == pair.rejected:
                tally.skip("identical answers")
            elif pair.size > min(self.max_tokens, self.context):
                longest = max(longest, pair.size)
                tally.skip(
                    TOO_LONG,
                    f"--max-tokens {longest} holds the longest"
                    if longest <= self.context
                    else f"the longest has {longest:,} tokens, the model's context {self.context:,}",
                )
            else:
                found.append(pair)

        tally.kept += len(found)
        return found

    def pair(self, one: Preference) -> Pair:
        """A comparison in token ids, whatever it says."""
        chosen, rejected = (
            encode_dialog(self.tokenizer, (*one.prompt, Message("assistant", answer.text)))[0]
            for answer in (one.chosen, one.rejected)
        )
        safe = tuple(
            -1 if known is None else int(known) for known in (one.chosen_safe, one.rejected_safe)
        )
        return Pair(
            chosen,
            rejected,
            DEGREES.index(one.degree),
            (safe[0], safe[1]),
            one.axis,
            (one.chosen.text, one.rejected.text),
            digest(opening(one.prompt)),
        )


def mixed(config: Config, encoder: Encoder, run: Run) -> dict[str, list[Pair]]:
    """The training pairs, set by set: those without a share whole, the others drawn until they make
    up their shares."""
    sets = {}
    for name, comparisons in config.preferences.items():
        tally = run.tally(f"preferences.{name}")
        sets[name] = encoder.pairs(select(comparisons, tally), tally)

    check_left(run, "preferences.")
    shares = {name: one.share for name, one in config.preferences.items() if one.share is not None}
    total = total_pairs(
        {name: len(found) for name, found in sets.items()},
        shares,
        frozenset(name for name, one in config.preferences.items() if one.repeat),
    )
    generator = np.random.default_rng(config.seed)

    for name, share in shares.items():
        found, tally, wanted = sets[name], run.tally(f"preferences.{name}"), round(share * total)
        passes, rest = divmod(wanted, len(found)) if found else (0, 0)
        sets[name] = found * passes + [
            found[index] for index in generator.permutation(len(found))[:rest]
        ]

        if wanted < len(found):
            tally.kept = wanted
            tally.skip(f"beyond its share of {share:g}", count=len(found) - wanted)

    return sets


def collate(pairs: Sequence[Pair]) -> Batch:
    """Pairs as one right-padded batch, the chosen rows first (see `objectives.ranking`)."""
    rows = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    tokens_BT = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for index, row in enumerate(rows):
        tokens_BT[index, : len(row)] = torch.tensor(row)

    lengths_B = torch.tensor([len(row) for row in rows])
    return {
        "tokens_BT": tokens_BT,
        "lengths_B": lengths_B,
        "read_B": lengths_B,
        "degrees_P": torch.tensor([pair.degree for pair in pairs]),
        "weights_P": torch.ones(len(pairs)),
        "safe_B": torch.tensor([pair.safe[0] for pair in pairs] + [pair.safe[1] for pair in pairs]),
    }


def measure(
    scorer: Scorer,
    pairs: Sequence[Pair],
    heldout: Mapping[str, Sequence[Pair]],
    precision: Precision,
    ranks: Ranks,
) -> dict[str, dict[str, Any]]:
    """Accuracy on each held-out set, and beside it what judges that understand nothing reach on the
    same pairs."""
    words = BagOfWords([pair.texts for pair in pairs]) if heldout and ranks.is_main else None
    measured: dict[str, dict[str, Any]] = {}
    for name, found in heldout.items():
        measured[name] = accuracy(scorer, found, precision, ranks)
        if words is not None:
            measured[name]["baselines"] = {
                "longer": _share(by_length((pair.texts, pair.axis == "safe") for pair in found)),
                "bag_of_words": _share(words.judge([pair.texts for pair in found])),
            }

    return measured


def accuracy(
    scorer: Scorer, pairs: Sequence[Pair], precision: Precision, ranks: Ranks
) -> dict[str, Any]:
    """Share of pairs whose preferred answer scores higher (a tie counts half), in all and by degree
    (Table 8)."""
    rows = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    scores = score_rows(scorer, rows, precision, ranks=ranks)
    right = [0.5 * (1 + np.sign(a - b)) for a, b in zip(scores[: len(pairs)], scores[len(pairs) :])]
    groups: Mapping[str, list[float]] = {
        "all": right,
        **{
            degree: [r for r, pair in zip(right, pairs) if pair.degree == index]
            for index, degree in enumerate(DEGREES)
        },
    }

    return {name: _share(group) for name, group in groups.items() if group}


def _share(right: Sequence[float]) -> dict[str, float]:
    low, high = wilson(sum(right), len(right))
    return {"accuracy": sum(right) / len(right), "n": len(right), "low": low, "high": high}


def told(name: str, found: Mapping[str, Any], axes: Set[Axis]) -> str:
    """A line that says how often a reward model is right about a set of such axes, and how often
    the baselines are."""
    one = found["all"]
    said = f"right on {_percent(one)} [{100 * one['low']:.1f}, {100 * one['high']:.1f}] of {one['n']:,} pairs of {name}"
    baselines = found.get("baselines")

    if baselines is None:
        return said

    length = "the shorter answer" if axes == {"safe"} else "the longer answer"
    length += " (about safety the shorter)" if len(axes) > 1 else ""
    return (
        f"{said}; {length} is on {_percent(baselines['longer'])}, a bag of words on "
        f"{_percent(baselines['bag_of_words'])}"
    )


def explained(name: str, found: Mapping[str, Any]) -> Iterator[str]:
    """Cautions about an accuracy that chance or a baseline explains: it lies within the interval,
    or above."""
    one = found["all"]
    right = f"right on {_percent(one)} of {one['n']:,} pairs of {name}"
    if one["high"] < 0.5:
        yield f"{right}: worse than chance; look whether the preferences are the wrong way round"
        return

    if one["low"] <= 0.5:
        yield f"{right}: chance explains that; more pairs or more updates are needed"
        return

    known = {"the length of answers": "longer", "a bag of words": "bag_of_words"}
    baselines = found.get("baselines", {})
    as_good = [
        said
        for said, key in known.items()
        if key in baselines and baselines[key]["accuracy"] >= one["low"]
    ]

    if as_good:
        yield (
            f"{right}: {' and '.join(as_good)} may explain that; more pairs, more updates or a larger model are "
            "needed to show more"
        )


def of_sets(
    run: Run, pairs: Sequence[Pair], heldout: Mapping[str, Sequence[Pair]]
) -> Iterator[str]:
    """Cautions about sets that give nothing, and about questions that are both trained on and
    measured on."""
    for name, tally in run.tallies.items():
        if tally.read and not tally.kept:
            yield f"{name} gives no pair: {tally.line()}"

    trained = {pair.conversation for pair in pairs}
    for name, found in heldout.items():
        known = sum(pair.conversation in trained for pair in found)
        if known:
            yield (
                f"{known:,} of {len(found):,} pairs of heldout.{name} open like pairs that are trained on: accuracy "
                "flatters there; split by question, as `llama2 prepare --heldout` does"
            )


def of_labels(pairs: Sequence[Pair], auxiliary_weight: float) -> Iterator[str]:
    """A caution where the auxiliary loss has no answer, or answers of one kind alone, to learn
    from."""
    labels = {label for pair in pairs for label in pair.safe if label >= 0}
    if auxiliary_weight and len(labels) < 2:
        found = (
            f"all labelled answers are {'safe' if labels == {1} else 'unsafe'}"
            if labels
            else "no pair has one"
        )
        yield (
            f"auxiliary_weight {auxiliary_weight:g} needs safety labels of both kinds, and {found}: the auxiliary "
            "loss separates nothing; give pairs with `safety`, or leave it out"
        )


def axis_of(pairs: Sequence[Pair]) -> Axis:
    """The axis on which most of the pairs were compared."""
    safe = sum(pair.axis == "safe" for pair in pairs)
    return "safe" if 2 * safe > len(pairs) else "helpful"


def _percent(one: Mapping[str, float]) -> str:
    return f"{100 * one['accuracy']:.1f} %"
