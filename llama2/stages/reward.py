"""Reward models (§3.2.2): ranking loss with a margin by degree; the safety model adds an auxiliary
loss.

Two recipes make the two models. Data mixes of the paper: the helpfulness model takes all
helpfulness comparisons and as many again drawn from the rest; the safety model 90 % safety and 10 %
helpfulness. One epoch: more overfits. The paper's best model starts from a chat checkpoint and does
not say which margin it used; `small` is the default.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from llama2.config import StageConfig
from llama2.data.loader import Rows
from llama2.evaluate.baselines import BagOfWords
from llama2.formats import checkpoint
from llama2.model.scorer import Scorer
from llama2.records import Axis
from llama2.results import (
    AccuracyResult,
    ReadCounts,
    RewardResult,
    SetAccuracy,
    SetShare,
    WordWeights,
)
from llama2.runs import Run
from llama2.stages.common import cautions
from llama2.stages.common.memory import Tower, flops_per_token
from llama2.stages.common.planning import UNKNOWN, Cluster, PlannedRuns, plan_training
from llama2.stages.common.reward_accuracy import (
    describe_accuracies,
    measure_accuracies,
    warn_of_chance,
)
from llama2.stages.common.reward_pairs import (
    Comparisons,
    EncodedPair,
    Encoder,
    collate,
    collate_shared,
    find_axis,
    mean_length,
    read_heldout,
    read_pairs,
    warn_of_trained,
)
from llama2.stages.common.training import Training, load_scorer, make_saver, train
from llama2.train.learner import Learner
from llama2.train.loop import Plan
from llama2.train.objectives import Margins, make_ranking_loss
from llama2.train.optim import AdamW


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
    shorten: bool = False
    """first take the oldest exchanges from a prompt that is too long, as far as it has several"""
    share_prompts: bool = False
    """compute what the conversations of a pair have in common once, in one row for both answers:
    the same up to rounding, with fewer tokens"""
    batch_size: int = Field(512, gt=0)
    """pairs in an optimizer step, over all ranks"""
    micro_batch_size: int = Field(8, gt=0)
    """pairs a rank computes at a time"""
    epochs: int = Field(1, gt=0)
    head_learning_rate: float | None = Field(None, gt=0)
    """of the scalar head, which a chat checkpoint lacks; that of the rest unless given. A fresh
    head begins at zero then, so that it soon is what it has learnt and not what was drawn"""
    training: Training = Training(optimizer=AdamW(learning_rate=1e-5), plan=Plan(save_every=200))
    """warm-up is 3 % of the steps, at least 5, unless plan.warmup_steps says otherwise"""


def plan(config: Config, cluster: Cluster, planned: PlannedRuns) -> dict[str, Any]:
    """Return parameters and memory, every answer as long as max_tokens allows; steps are known once
    the data is read."""
    shape = planned.inherit(config.out, config.model)
    if shape is None:
        return UNKNOWN

    return plan_training(
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
    home = config.training.home(run.ranks)
    scorer, tokenizer = load_scorer(config.model, home, seed=config.seed)
    rates = choose_rates(config, scorer)
    context = scorer.config.max_position_embeddings
    encoder = Encoder(tokenizer, config.max_tokens, context, config.shorten)
    sets = read_pairs(config.preferences, encoder, run, config.seed)
    pairs = list(chain.from_iterable(sets.values()))
    heldout = read_heldout(config.heldout, encoder, run, config.seed)

    source = Rows(
        pairs,
        collate_shared if config.share_prompts else collate,
        run.ranks,
        batch_size=config.batch_size,
        micro_batch_size=config.micro_batch_size,
        epochs=config.epochs,
        seed=config.seed,
        size=lambda pair: pair.joint_size if config.share_prompts else pair.size,
    )
    plan = config.training.plan
    steps = source.steps if plan.max_steps is None else min(plan.max_steps, source.steps)
    settings = config.training.with_steps(source.steps, warmup_steps=count_warmup(plan, steps))
    for line in (
        *cautions.warn_of_length(
            plan, source.steps, len(pairs), "pair", config.batch_size, config.epochs
        ),
        *warn_of_sets(run, pairs, heldout),
        *warn_of_labels(pairs, config.auxiliary_weight),
    ):
        run.warn(line)

    learner = train(
        run,
        scorer,
        source,
        make_ranking_loss(config.margins, config.auxiliary_weight),
        settings,
        save_model=make_saver(scorer, tokenizer, run.ranks),
        title="reward",
        rates=rates,
        flops_per_token=count_flops(config, scorer, pairs),
    )
    scorer.eval()
    words = fit_words(run, pairs) if run.ranks.is_main else None
    accuracies = measure_accuracies(
        scorer, words, heldout, settings.precision, run.ranks, config.share_prompts
    )
    write_results(run, scorer, learner, sets, accuracies)
    conclude(run, find_axis(pairs), heldout, accuracies)


def conclude(
    run: Run,
    axis: Axis,
    heldout: Mapping[str, Sequence[EncodedPair]],
    accuracies: Mapping[str, SetAccuracy],
) -> None:
    """Have all accuracies said at the end, and warn of those on the model's own axis that prove
    nothing."""
    # the last line, of a set of the model's axis, stands for the run
    order = sorted(heldout, key=lambda name: find_axis(heldout[name]) == axis)
    for line in describe_accuracies({name: heldout[name] for name in order}, accuracies):
        run.conclude(line)

    for name in order:
        if find_axis(heldout[name]) == axis:
            for line in warn_of_chance(name, accuracies[name]):
                run.warn(line)


def choose_rates(config: Config, scorer: Scorer) -> dict[str, float] | None:
    """Return the learning rate of the head, if it has one of its own; a fresh head is set to zero
    then."""
    if config.head_learning_rate is None:
        return None
    if not checkpoint.is_scorer(config.model):
        scorer.score.weight.data.zero_()

    return {"score.": config.head_learning_rate}


def count_flops(config: Config, scorer: Scorer, pairs: Sequence[EncodedPair]) -> float:
    """Return the FLOPs of training on a token of these pairs."""
    frozen = config.training.frozen_layers
    return flops_per_token(scorer.config, mean_length(pairs), scalar=True, frozen_layers=frozen)


def fit_words(run: Run, pairs: Sequence[EncodedPair]) -> BagOfWords:
    """Fit a bag of words to the training pairs and leave it beside the model."""
    words = BagOfWords.fit([pair.texts for pair in pairs])
    weights = words.weights_F.tolist()
    run.write_result(WordWeights(fitted_to=words.count, words=words.words, word_weights=weights))
    return words


def write_results(
    run: Run,
    scorer: Scorer,
    learner: Learner,
    sets: Mapping[str, Sequence[EncodedPair]],
    accuracies: Mapping[str, SetAccuracy],
) -> None:
    """Write what was trained on, by set, and the accuracy."""
    total = sum(map(len, sets.values()))
    shares = {}
    for name, pairs in sets.items():
        shares[name] = SetShare(pairs=len(pairs), share=round(len(pairs) / total, 4))

    run.write_result(AccuracyResult(sets=dict(accuracies)))
    run.write_result(
        RewardResult(
            parameters=scorer.config.parameters(),
            steps=learner.step,
            tokens=learner.tokens,
            trained=learner.trained,
            pairs=total,
            sets=shares,
            read={name: ReadCounts.of(tally) for name, tally in run.tallies.items()},
        )
    )

    if not accuracies:
        run.conclude(
            f"{total:,} pairs, {learner.tokens:,} tokens read; no held-out pairs to measure "
            "accuracy on"
        )


def count_warmup(plan: Plan, steps: int) -> int:
    """Return the paper's 3 % of the steps and at least 5, as far as there are steps for it, unless
    the plan says otherwise."""
    if plan.warmup_steps is not None:
        return plan.warmup_steps

    return min(max(5, round(0.03 * steps)), steps - 1)


def warn_of_sets(
    run: Run, pairs: Sequence[EncodedPair], heldout: Mapping[str, Sequence[EncodedPair]]
) -> Iterator[str]:
    """Caution about sets that give nothing, and about questions that are both trained on and
    measured on."""
    for name, tally in run.tallies.items():
        if tally.read and not tally.kept:
            yield f"{name} gives no pair: {tally.line()}"

    trained = {pair.conversation for pair in pairs}
    yield from warn_of_trained(trained, heldout)


def warn_of_labels(pairs: Sequence[EncodedPair], auxiliary_weight: float) -> Iterator[str]:
    """Caution where the auxiliary loss has no answer, or answers of one kind alone, to learn
    from."""
    labels = set(chain.from_iterable(pair.safe for pair in pairs)) - {-1}
    if not auxiliary_weight or len(labels) == 2:
        return

    state = "no pair has one"
    if labels:
        state = f"all labelled answers are {'safe' if labels == {1} else 'unsafe'}"

    yield (
        f"auxiliary_weight {auxiliary_weight:g} needs safety labels of both kinds, and {state}: "
        "the auxiliary loss separates nothing; give pairs with `safety`, or leave it out"
    )
