"""Every version of the model on the same held-out prompts (§3.4, §4.4): the data behind Figures 11,
17 and 20.

Versions are given in the order in which they were made; the first is the SFT model. Each answers
all prompts once, and the judges look at the same answers. Win rates leave out ties. The paper does
not say how the answers were sampled that its people and models compared; temperature 0.6 and top-p
0.9 are the defaults of Meta's published chat code.

One model is in memory at a time, and finished parts are kept: see `answers`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, field_validator

from llama2 import atomic, records, runs
from llama2.config import Config as Section
from llama2.config import StageConfig
from llama2.errors import UserError
from llama2.evaluate import attention, ghost, summary
from llama2.evaluate.judges import KINDS, classify, rate
from llama2.formats.checkpoint import config_of, open_tokenizer
from llama2.generate.dialogue import Answer, Chat
from llama2.generate.engine import Engine
from llama2.generate.remote import Server, connect
from llama2.generate.rewards import to_probability
from llama2.generate.sampling import Sampling
from llama2.judging import Rating
from llama2.model import quantize
from llama2.model.llama import Llama
from llama2.records import Axis, Message, Messages, Prompt
from llama2.results import AttentionResult, EvaluateResult, Obedience, SamplingSettings
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
from llama2.stages.common.judges import make_judge
from llama2.stages.common.planning import Cluster, PlannedRuns, plan_judging
from llama2.stages.common.training import load_policy
from llama2.terminal_text import say
from llama2.tokenizer.template import check_template, require_system
from llama2.tokenizer.tokenizer import Tokenizer


class Judges(Section):
    """The reward models that judge; each is optional."""

    helpful: Path | None = None
    """reward model of helpfulness"""
    safe: Path | None = None
    """reward model of safety"""

    def by_axis(self) -> dict[Axis, Path]:
        """Those that are given."""
        paths: dict[Axis, Path | None] = {"helpful": self.helpful, "safe": self.safe}
        return {axis: path for axis, path in paths.items() if path is not None}


class Config(StageConfig):
    """Compare versions of a model on held-out prompts."""

    versions: dict[str, Path]
    """name -> checkpoint, in the order in which they were made; the first (SFT) is the yardstick"""
    prompts: Path
    """held-out prompts (JSONL); where all carry ground truth (`metadata.gold`) it judges besides
    the reward models; where only some do, it does not"""
    ghost: Path | None = None
    """dialogs under a lasting instruction (JSONL of prompts with `metadata.instruction` and
    `.questions`)"""
    rewards: Judges = Judges()
    """reward models that judge"""
    limit: int | None = Field(None, gt=0)
    """use only the first prompts"""
    ghost_limit: int | None = Field(None, gt=0)
    """use only the first dialogs of `ghost`"""
    temperature: float = Field(0.6, ge=0)
    """of the sampled answers; the default of Meta's chat code (the paper does not say)"""
    top_p: float = Field(0.9, gt=0, le=1)
    """nucleus of the sampled answers"""
    greedy: bool = True
    """measure helpfulness of greedy answers too (only where there is ground truth)"""
    max_tokens: int = Field(256, gt=0)
    """most tokens of an answer"""
    slots: int = Field(128, gt=0)
    """answers decoded side by side"""
    precision: quantize.WeightPrecision = "bf16"
    """of all products and of the versions' weights; int8 and int4 measure what is served so. Reward
    models judge in bf16 then"""
    conversations: int = Field(8, ge=0)
    """prompts whose answers by every version are shown in the report"""
    servers: dict[str, Server] = {}
    """name of a version -> the server that answers for it; the others answer here"""
    attention: tuple[str, ...] = ()
    """versions to draw the attention heat map of (without and with Ghost Attention); needs
    `ghost`"""

    @field_validator("versions")
    @classmethod
    def _some(cls, versions: dict[str, Path]) -> dict[str, Path]:
        if not versions:
            raise ValueError("at least one version is needed")

        return versions

    @property
    def sampling(self) -> Sampling:
        """Settings with which answers are drawn."""
        return Sampling(self.temperature, self.top_p, max_tokens=self.max_tokens, seed=self.seed)


ROLES: tuple[ghost.InstructionRole, ...] = ("user", "system")
ATTENTION_DIALOGS = 16


@dataclass(frozen=True)
class VersionAnswers:
    """Answers of one version."""

    answers: list[Answer]
    """one a prompt"""
    greedy: list[Answer] | None
    """the same at temperature 0, where ground truth judges them"""
    talks: dict[ghost.InstructionRole, list[Messages]]
    """where the instruction stands -> the dialogs held under it"""


def plan(config: Config, cluster: Cluster, planned: PlannedRuns) -> dict[str, Any]:
    """Return memory: one version after the other, then one reward model after the other."""
    local = [path for name, path in config.versions.items() if name not in config.servers]
    return plan_judging(
        list(map(planned.shape, local)),
        list(map(planned.shape, config.rewards.by_axis().values())),
        config.precision,
        config.slots,
        config.max_tokens,
        cluster,
        whole_context=bool(config.ghost),
        looked_at=bool(config.attention),
    )


def run(config: Config, run: runs.Run) -> None:
    """Write evaluation.json (figures), samples.jsonl (every answer with its scores),
    attention.json."""
    _check(config)
    paths = list(config.versions.values())
    dialogs = ghost.read(config.ghost, config.ghost_limit) if config.ghost else []
    prompts = _read_prompts(config, run, paths)
    places = find_equals(paths)
    answers = {}
    for place in dict.fromkeys(places):
        answers[place] = answer_all(config, place, run, prompts, dialogs)

    scores = score_answers(config, run, prompts, answers, paths)
    versions = {}
    for place, version in answers.items():
        versions[place] = describe_version(prompts, dialogs, version, scores[place])

    results = {name: versions[place] for name, place in zip(config.versions, places, strict=True)}
    for name, result in results.items():
        _say(run, f"{name}: {_describe_line(result)}")

    run.write_result(
        summarise(
            prompts,
            results,
            config.conversations,
            {name: path.resolve().name for name, path in config.versions.items()},
            SamplingSettings(
                temperature=config.temperature, top_p=config.top_p, max_tokens=config.max_tokens
            ),
        )
    )
    if run.ranks.is_main:
        lines = []
        for name, result in results.items():
            for row in summary.list_samples(name, prompts, result):
                lines.append(json.dumps(row.model_dump(exclude_defaults=True)) + "\n")

        atomic.write_atomic(run.path / "samples.jsonl", "".join(lines))

    if config.attention:
        draw_attention(config, run, dialogs, results[config.attention[-1]].talks)


def summarise(
    prompts: Sequence[Prompt],
    versions: Mapping[str, summary.Version],
    conversations: int,
    checkpoints: Mapping[str, str],
    sampling: SamplingSettings,
) -> EvaluateResult:
    """Summarise what versions, in the order in which they were made, said to the same prompts."""
    kinds = [classify(prompt) for prompt in prompts]
    talks = {name: version.talks[0] for name, version in versions.items() if version.talks}
    results = {name: summary.measure(prompts, kinds, version) for name, version in versions.items()}
    counts = {kind: kinds.count(kind) for kind in KINDS}
    return EvaluateResult(
        versions=list(versions),
        prompts={**counts},
        results=results,
        win_rates=list(summary.compare_versions(kinds, versions)),
        conversations=summary.show_prompts(prompts, versions, conversations),
        ghost_dialogs={name: summary.list_turns(talk) for name, talk in talks.items()},
        checkpoints=dict(checkpoints),
        sampling=sampling,
    )


def _check(config: Config) -> None:
    """Refuse what can be refused before anything is loaded."""
    for key, names in (("attention", config.attention), ("servers", config.servers)):
        unknown = [name for name in names if name not in config.versions]
        if unknown:
            raise UserError(
                f"{key}: there is no version '{unknown[0]}'",
                f"versions: {', '.join(config.versions)}",
            )

    if config.attention and not config.ghost:
        raise UserError(
            "attention needs `ghost`", "give the file of dialogs under a lasting instruction"
        )

    for path in config.rewards.by_axis().values():
        check_judge(path)


def _read_prompts(config: Config, run: runs.Run, paths: Sequence[Path]) -> list[Prompt]:
    """Read the prompts that fit into every version, and say so where truth judges none of them."""
    every = list(records.read(Prompt, config.prompts))[: config.limit]
    prompts = keep_fitting(paths, every, 8, run.tally("prompts"), config.prompts)
    known = sum(map(make_judge().accepts, prompts))
    if 0 < known < len(prompts):
        _say(
            run,
            f"{known} of {len(prompts)} prompts carry ground truth: it does not judge, as it must "
            "judge all or none",
        )

    return prompts


# --- answers ---
def answer_all(
    config: Config,
    place: int,
    run: runs.Run,
    prompts: Sequence[Prompt],
    dialogs: Sequence[ghost.GhostDialog],
) -> VersionAnswers:
    """Have the version at this place answer all prompts and hold all dialogs."""
    begin, name = time.monotonic(), list(config.versions)[place]
    messages = [prompt.messages for prompt in prompts]
    greedy: list[Answer] | None = None
    talks: dict[ghost.InstructionRole, list[Messages]] = {}

    with load_when_needed(lambda: load_version(config, name, run), run.ranks.device) as chat:
        answers = answer_prompts(
            run, f"answers-{place}", chat, messages, config.sampling, config.slots
        )
        if config.greedy and all(map(make_judge().accepts, prompts)):
            sampling = replace(config.sampling, temperature=0.0)
            greedy = answer_prompts(run, f"greedy-{place}", chat, messages, sampling, config.slots)

        for role in _list_roles(config, place, run) if dialogs else ():
            part = f"talks-{role}-{place}"
            talks[role] = hold_dialogs(config, run, part, chat, dialogs, role)

    _say(run, f"{name}: answered in {time.monotonic() - begin:.0f} s")
    return VersionAnswers(answers, greedy, talks)


def _list_roles(config: Config, place: int, run: runs.Run) -> tuple[ghost.InstructionRole, ...]:
    """Return where an instruction may stand for a version; it is said if the chat template has no
    place for a system turn."""
    path = list(config.versions.values())[place]
    try:
        require_system(open_tokenizer(path))
    except UserError as error:
        _say(run, f"{error.cause}: instructions stand in the first user turn alone")
        return ("user",)

    return ROLES


def hold_dialogs(
    config: Config,
    run: runs.Run,
    name: str,
    chat: Callable[[], Chat],
    dialogs: Sequence[ghost.GhostDialog],
    role: ghost.InstructionRole,
) -> list[Messages]:
    """Hold all dialogs with the instruction in one place, in parts under `name`."""

    def hold(part: Sequence[ghost.GhostDialog], first: int) -> list[Any]:
        rows = []
        for talk in ghost.converse(chat(), part, config.sampling, role, first):
            rows.append([[turn.role, turn.content] for turn in talk])

        return rows

    talks = []
    for row in work_in_parts(run, name, dialogs, ROUNDS * config.slots, hold):
        talks.append(tuple(Message(role_, content) for role_, content in row))

    return talks


def load_version(config: Config, name: str, run: runs.Run) -> Chat:
    """Load a version ready to answer: here, or its server, whose answers are kept until the run is
    finished."""
    checkpoint = config.versions[name]
    check_template(checkpoint, open_tokenizer(checkpoint))
    if name in config.servers:
        tokenizer = open_tokenizer(checkpoint)
        context = config_of(checkpoint).max_position_embeddings
        journal = run.path / runs.CHECKPOINTS / "answers" / name
        server = config.servers[name]
        remote = connect(server, tokenizer, context, state=journal, rank=run.ranks.rank)
        return Chat(remote, tokenizer, run.ranks)

    model, tokenizer = load_model(config, name, run.ranks.device)
    engine = Engine(model, slots=config.slots, precision=config.precision)
    engine.test(checkpoint)
    return Chat(engine, tokenizer, run.ranks)


def load_model(config: Config, name: str, device: torch.device) -> tuple[Llama, Tokenizer]:
    """Load a version that is only read, its weights as they are computed with."""
    dtype = quantize.load_dtype(config.precision)
    model, tokenizer = load_policy(config.versions[name], device, dtype)
    return model.eval().requires_grad_(False), tokenizer


# --- judgements ---
def score_answers(
    config: Config,
    run: runs.Run,
    prompts: Sequence[Prompt],
    answers: Mapping[int, VersionAnswers],
    paths: Sequence[Path],
) -> dict[int, dict[Axis, list[float]]]:
    """Return the probabilities that each reward model gives to the answers of each version."""
    texts = {place: version.answers for place, version in answers.items()}
    precision = quantize.compute_precision(config.precision)
    probabilities: dict[int, dict[Axis, list[float]]] = {place: {} for place in answers}
    for axis, path in config.rewards.by_axis().items():
        scores = judge_answers(run, f"judge-{axis}", path, precision, prompts, texts, paths)
        for place, row in scores.items():
            probabilities[place][axis] = list(map(to_probability, row))

    return probabilities


def describe_version(
    prompts: Sequence[Prompt],
    dialogs: Sequence[ghost.GhostDialog],
    version: VersionAnswers,
    scores: Mapping[Axis, Sequence[float]],
) -> summary.Version:
    """Return what the judges think of a version. `scores` are probabilities."""
    obedience = {role: ghost.count_by_turn(dialogs, talks) for role, talks in version.talks.items()}
    return summary.Version(
        version.answers,
        _rate(prompts, version.answers),
        _rate(prompts, version.greedy),
        scores,
        Obedience(**obedience),
        version.talks.get("user", []),
    )


def _rate(prompts: Sequence[Prompt], answers: Sequence[Answer] | None) -> list[Rating] | None:
    if answers is None:
        return None

    return rate(make_judge(), prompts, [answer.text for answer in answers])


def _describe_line(result: summary.Version) -> str:
    tokens = sum(len(answer.completion.tokens) for answer in result.answers)
    parts = [f"{tokens / len(result.answers):.0f} tokens an answer"]
    if result.ratings:
        mean = sum(rating.helpfulness for rating in result.ratings) / len(result.ratings)
        parts.append(f"rated {mean:.3f}")

    for axis, scores in result.rewards.items():
        parts.append(f"reward {axis} {sum(scores) / len(scores):.3f}")

    if result.ghost.user:
        parts.append("obeys " + "/".join(f"{turn.rate:.2f}" for turn in result.ghost.user))

    return ", ".join(parts)


def draw_attention(
    config: Config, run: runs.Run, dialogs: Sequence[ghost.GhostDialog], talks: Sequence[Messages]
) -> None:
    """Write Figure 10 of the first dialogs, with the answers of the last version asked for; one
    model after the other."""
    pairs = zip(talks, dialogs, strict=True)
    shown = [(talk, dialog.instruction) for talk, dialog in pairs if talk][:ATTENTION_DIALOGS]
    if not shown:
        return

    names, device = config.attention, run.ranks.device
    tokenizer = open_tokenizer(config.versions[names[-1]])
    context = min(config_of(config.versions[name]).max_position_embeddings for name in names)
    looks: dict[str, list[attention.Look]] = {}
    for name in names:
        load = partial(load_model, config, name, device)
        with load_when_needed(load, device) as version:

            def look(part: Sequence[attention.Talk], first: int) -> list[Any]:
                model, _ = version()
                seen = [attention.look(model, tokenizer, talk, context) for talk in part]
                return [[each.starts, each.map] for each in seen]

            part = f"attention-{list(config.versions).index(name)}"
            rows = work_in_parts(run, part, shown, len(shown), look)
            looks[name] = [attention.Look(*row) for row in rows]

    run.write_result(AttentionResult(**attention.figure(looks, tokenizer, shown, context)))


def _say(run: runs.Run, line: str) -> None:
    if run.ranks.is_main:
        say(line)
