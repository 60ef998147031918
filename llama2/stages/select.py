"""Keep a new version only if it beats the one before it (§3.4.1).

The paper picks candidates by their reward and validates major versions with people. Here people are
simulated annotators, or the reward models where prompts carry no truth; both versions answer the
same held-out prompts and are compared side by side. The run directory becomes the checkpoint that
is kept, so later steps need not know which.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

from pydantic import Field, model_validator

from llama2.config import StageConfig
from llama2.devices import Precision
from llama2.errors import UserError
from llama2.evaluate import ghost
from llama2.evaluate.judges import classify
from llama2.evaluate.winrate import bound_share, compare
from llama2.formats import checkpoint, hf, hf_directory
from llama2.generate.dialogue import Answer
from llama2.generate.rewards import RewardModels, check_rule, combine
from llama2.judging import Annotators, ComparisonRequest, Outcome
from llama2.records import Axis, Preference, Prompt, Response
from llama2.results import SelectResult, WinShare
from llama2.runs import Run
from llama2.runs.parts import work_in_parts
from llama2.stages.common.answers import (
    ROUNDS,
    answer_prompts,
    check_judge,
    find_equals,
    judge_answers,
    keep_fitting,
    load_when_needed,
)
from llama2.stages.common.instructions import Kind, read_dialogs
from llama2.stages.common.judges import make_annotators
from llama2.stages.common.planning import Cluster, PlannedRuns, plan_judging
from llama2.stages.common.sampling import Sample, load_chat, read_prompts
from llama2.tally import Tally


class Config(StageConfig):
    """Choose between a candidate and its predecessor."""

    candidate: Path
    predecessor: Path
    prompts: Path
    """held-out prompts"""
    limit: int | None = Field(None, gt=0)
    ghost: Path | None = None
    """held-out dialogs under a lasting instruction, or any prompts with `ghost_turns`: each dialog
    is a comparison too, won by whoever obeys in more turns"""
    ghost_turns: int | None = Field(None, gt=0)
    """make dialogs of so many questions of `ghost`, under instructions that a program can check in
    the text"""
    ghost_instructions: tuple[Kind, ...] | None = None
    """kinds of these instructions; without any, all"""
    ghost_limit: int | None = Field(None, gt=0)
    """use only the first dialogs of `ghost`"""
    rewards: RewardModels | None = None
    """judge by these reward models; without them simulated annotators judge, who need prompts with
    ground truth"""
    win_rate: float = Field(0.5, ge=0, le=1)
    """the candidate must win more than this share of decided comparisons"""
    worst_kind: float = Field(0.4, ge=0, le=1)
    """and more than this share on every kind of prompt (helpful, unsafe, borderline, ghost), unless
    chance may have done it: the interval reaches a half, at 95 % for all kinds together"""
    sample: Sample = Sample(temperature=0.6, top_p=0.9)

    @model_validator(mode="after")
    def _here(self) -> Config:
        if self.sample.server is not None:
            raise ValueError(
                "sample.server answers for one model, and here two are compared: leave it out"
            )

        return self


def plan(config: Config, cluster: Cluster, planned: PlannedRuns) -> dict[str, Any]:
    """Return memory: one version after the other, then one reward model after the other."""
    planned.inherit(config.out, config.candidate)
    judges = config.rewards.paths() if config.rewards else ()
    return plan_judging(
        [planned.shape(config.candidate), planned.shape(config.predecessor)],
        [planned.shape(path) for path in judges],
        config.sample.precision,
        config.sample.slots,
        config.sample.max_tokens,
        cluster,
        whole_context=bool(config.ghost),
    )


def run(config: Config, run: Run) -> None:
    """Write verdict.json and the checkpoint that is kept."""
    paths = (config.candidate, config.predecessor)
    if config.rewards:
        check_rule(config.rewards)
        for path in config.rewards.paths():
            check_judge(path, paths)

    tally = run.tally("prompts")
    prompts = read_prompts(config.prompts, config.limit, config.seed)
    prompts = keep_fitting(paths, prompts, 16, tally, config.prompts)
    annotators = make_annotators(config.seed + 1)
    if config.rewards is None:
        prompts = choose_accepted(config, annotators, prompts, tally)

    dialogs = read_dialogs(config, run)
    places = find_equals(paths)
    versions = {}
    for place in dict.fromkeys(places):
        versions[place] = answer_all(config, run, place, paths[place], prompts, dialogs)

    answers = {place: version.answers for place, version in versions.items()}
    if config.rewards:
        scores = score_versions(
            config.rewards, config.sample.precision, run, prompts, answers, paths
        )
        preferred = compare_scores([scores[place] for place in places])
    else:
        texts = []
        for place in places:
            texts.append([each.text for each in answers[place]])

        preferred = compare_texts(annotators, prompts, texts)

    kinds: list[str] = [classify(prompt) for prompt in prompts]
    if dialogs:
        preferred += compare_scores([versions[place].obeyed for place in places])
        kinds += ["ghost"] * len(dialogs)

    result = judge(config, kinds, preferred)
    if run.ranks.is_main:
        copy(config.candidate if result.kept == "candidate" else config.predecessor, run.path)

    run.write_result(result)


def choose_accepted(
    config: Config, annotators: Annotators, prompts: Sequence[Prompt], tally: Tally
) -> list[Prompt]:
    """Return the prompts that the annotators accept, and count the others as left out.

    UserError if there are none.
    """
    accepted = [prompt for prompt in prompts if annotators.accepts(prompt)]
    if not accepted:
        raise UserError(
            f"{config.prompts}: no prompt carries the ground truth (metadata.gold) that simulated "
            "annotators need",
            "give reward models that judge: rewards.helpful, rewards.safe",
        )

    tally.kept = len(accepted)
    tally.skip(
        "without ground truth",
        "give rewards.helpful, which judges all",
        len(prompts) - len(accepted),
    )
    return accepted


# --- answers and scores ---
@dataclass(frozen=True)
class SideAnswers:
    """Answers of one version to all prompts, and its obedience."""

    answers: list[Answer]
    obeyed: list[float]
    """turns of each dialog in which it obeyed"""


def answer_all(
    config: Config,
    run: Run,
    place: int,
    path: Path,
    prompts: Sequence[Prompt],
    dialogs: Sequence[ghost.GhostDialog],
) -> SideAnswers:
    """Have a version answer all prompts and hold all dialogs."""
    sampling, slots = config.sample.make_sampling(config.seed), config.sample.slots
    messages = [prompt.messages for prompt in prompts]
    with load_when_needed(lambda: load_chat(path, config.sample, run), run.ranks.device) as chat:

        def hold(part: Sequence[ghost.GhostDialog], first: int) -> list[float]:
            talks = ghost.converse(chat(), part, sampling, first=first)
            turns = [ghost.check_turns(dialog, talk) for dialog, talk in zip(part, talks)]
            return [float(sum(obeyed)) for obeyed in turns]

        answers = answer_prompts(run, f"answers-{place}", chat, messages, sampling, slots)
        rows = work_in_parts(run, f"talks-{place}", dialogs, ROUNDS * slots, hold)
        return SideAnswers(answers, list(rows))


def score_versions(
    models: RewardModels,
    precision: Precision,
    run: Run,
    prompts: Sequence[Prompt],
    answers: Mapping[int, Sequence[Answer]],
    paths: Sequence[Path],
) -> dict[int, list[float]]:
    """Return the paper's joined reward of every answer of each version; one reward model is in
    memory at a time."""
    helpful = judge_answers(
        run, "judge-helpful", models.helpful, precision, prompts, answers, paths
    )
    safe = {place: [math.inf] * len(prompts) for place in answers}
    if models.safe:
        safe = judge_answers(run, "judge-safe", models.safe, precision, prompts, answers, paths)

    rewards = {}
    for place in answers:
        pairs = zip(helpful[place], safe[place], prompts)
        rewards[place] = [combine(models, h, s, prompt.safety) for h, s, prompt in pairs]

    return rewards


def compare_scores(scores: Sequence[Sequence[float]]) -> list[float]:
    """Return 1 where the candidate scores higher, -1 where lower, 0 for a tie."""
    return [float((ours > theirs) - (ours < theirs)) for ours, theirs in zip(*scores)]


def compare_texts(
    annotators: Annotators, prompts: Sequence[Prompt], texts: Sequence[Sequence[str]]
) -> list[float]:
    """Return what annotators prefer: 1 the candidate, -1 the predecessor, 0 for equal texts.

    On unsafe prompts the version that alone is labelled safe wins, and nothing else counts: how
    well a refusal is put must not outweigh harm.
    """
    scores = [0.0] * len(prompts)
    comparisons: dict[int, ComparisonRequest] = {}
    for place, (prompt, candidate, predecessor) in enumerate(zip(prompts, *texts)):
        if candidate != predecessor:
            answers = (Response(candidate, "candidate"), Response(predecessor, "predecessor"))
            axis: Axis = "safe" if prompt.safety else "helpful"
            comparisons[place] = ComparisonRequest(prompt, answers, axis)

    for place, (_, outcome) in zip(comparisons, annotators.compare(comparisons.values())):
        scores[place] = _score_outcome(outcome)

    return scores


def _score_outcome(outcome: Outcome) -> float:
    """Return 1 for a win of the candidate, -1 for a loss, 0 for everything else."""
    if not isinstance(outcome, Preference):
        return 0.0
    if outcome.axis == "safe" and outcome.safety != "preferred_only":
        return 0.0

    return 1.0 if outcome.chosen.model == "candidate" else -1.0


# --- the choice ---
def judge(config: Config, kinds: Sequence[str], preferred: Sequence[float]) -> SelectResult:
    """Decide which version is kept, and why: by the win rate over all comparisons and on every
    kind."""
    by_kind: dict[str, list[float]] = {kind: [] for kind in sorted(set(kinds))}
    for kind, outcome in zip(kinds, preferred):
        by_kind[kind].append(outcome)

    overall = _count_wins(preferred)
    rates = {kind: _count_wins(outcomes) for kind, outcomes in by_kind.items()}
    reasons = []
    if overall.rate is None:
        reasons.append(f"all {overall.ties} comparisons are ties")
    elif overall.rate <= config.win_rate:
        reasons.append(
            f"it wins {overall.rate:.0%} of decided comparisons, {config.win_rate:.0%} are needed"
        )

    # looking at more kinds finds more by chance (Bonferroni)
    width = NormalDist().inv_cdf(1 - 0.025 / len(rates))
    for kind, rate in rates.items():
        if rate.rate is not None and rate.rate <= config.worst_kind:
            _, high = bound_share(rate.wins, rate.wins + rate.losses, width)
            if high < 0.5:
                reasons.append(
                    f"on {kind} prompts it wins {rate.rate:.0%}, {config.worst_kind:.0%} are needed"
                )

    shares = {"all": overall, **rates}
    return SelectResult(
        candidate=config.candidate.name,
        predecessor=config.predecessor.name,
        kept="predecessor" if reasons else "candidate",
        reason="; ".join(reasons) or "it beats its predecessor",
        needed=config.win_rate,
        win_rate=shares,
    )


def _count_wins(outcomes: Sequence[float]) -> WinShare:
    return compare(outcomes, [0.0] * len(outcomes))


def copy(source: Path, target: Path) -> None:
    """Put a model into another directory too: its files as hard links where the file system allows,
    or what a GGUF file holds."""
    if source.is_file():
        model = checkpoint.open_checkpoint(source)
        hf.write(model, target, beside=checkpoint.open_tokenizer(source).save)
        return

    for name in hf_directory.list_model_files(source):
        (target / name).unlink(missing_ok=True)
        try:
            os.link((source / name).resolve(), target / name)
        except OSError:
            shutil.copy2(source / name, target / name)
