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
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, field_validator

from llama2 import atomic, records, runs
from llama2.config import Config as Section
from llama2.config import StageConfig
from llama2.errors import UserError
from llama2.evaluate import ghost, summary
from llama2.evaluate.conduct_summary import compare_conduct, describe_judges
from llama2.evaluate.judges import KINDS, classify
from llama2.formats.checkpoint import config_of, open_tokenizer
from llama2.generate.dialogue import Answer, Chat
from llama2.generate.engine import Engine
from llama2.generate.remote import Server, connect
from llama2.generate.sampling import Sampling
from llama2.model import quantize
from llama2.model.llama import Llama
from llama2.records import Axis, Message, Messages, Prompt
from llama2.results import AttentionResult, EvaluateResult, SamplingSettings
from llama2.runs.parts import work_in_parts
from llama2.stages.common.answers import (
    ROUNDS,
    answer_prompts,
    check_judge,
    find_equals,
    keep_fitting,
    load_when_needed,
)
from llama2.stages.common.attention_maps import draw_attention
from llama2.stages.common.instructions import Kind, read_dialogs
from llama2.stages.common.judges import make_judge
from llama2.stages.common.planning import Cluster, PlannedRuns, plan_judging
from llama2.stages.common.training import load_policy
from llama2.stages.common.version_scores import (
    VersionAnswers,
    describe_line,
    describe_version,
    score_answers,
)
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


class OtherJudge(Section):
    """A reward model that nothing was optimised against."""

    model: Path
    """a reward model, made of other comparisons or with another seed than those of `rewards`"""
    axis: Axis
    """what it judges"""


class Config(StageConfig):
    """Compare versions of a model on held-out prompts."""

    versions: dict[str, Path]
    """name -> checkpoint, in the order in which they were made; the first (SFT) is the yardstick"""
    prompts: Path
    """held-out prompts (JSONL); where all carry ground truth (`metadata.gold`) it judges besides
    the reward models; where only some do, it does not"""
    ghost: Path | None = None
    """dialogs under a lasting instruction (JSONL of prompts with `metadata.instruction` and
    `.questions`); any prompts with `ghost_turns`"""
    ghost_turns: int | None = Field(None, gt=0)
    """make dialogs of so many questions of `ghost`, under instructions that a program can check in
    the text"""
    ghost_instructions: tuple[Kind, ...] | None = None
    """kinds of these instructions; without any, all"""
    rewards: Judges = Judges()
    """reward models that judge"""
    judges: dict[str, OtherJudge] = {}
    """name -> a further reward model that is only a judge: versions were not optimised against
    it"""
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

    def list_judges(self) -> list[Path]:
        """Return every reward model that judges."""
        others = [judge.model for judge in self.judges.values()]
        return [*self.rewards.by_axis().values(), *others]

    def name_judges(self) -> dict[str, str]:
        """Return axis, or judge, -> name of the reward model's run directory."""
        paths: dict[str, Path] = dict(self.rewards.by_axis().items())
        paths |= {name: judge.model for name, judge in self.judges.items()}
        return {name: path.resolve().name for name, path in paths.items()}

    @property
    def sampling(self) -> Sampling:
        """Settings with which answers are drawn."""
        return Sampling(self.temperature, self.top_p, max_tokens=self.max_tokens, seed=self.seed)


ROLES: tuple[ghost.InstructionRole, ...] = ("user", "system")


def plan(config: Config, cluster: Cluster, planned: PlannedRuns) -> dict[str, Any]:
    """Return memory: one version after the other, then one reward model after the other."""
    local = [path for name, path in config.versions.items() if name not in config.servers]
    return plan_judging(
        list(map(planned.shape, local)),
        list(map(planned.shape, config.list_judges())),
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
    dialogs = read_dialogs(config, run)
    prompts = _read_prompts(config, run, paths)
    places = find_equals(paths)
    answers = {}
    for place in dict.fromkeys(places):
        answers[place] = answer_all(config, place, run, prompts, dialogs)

    judges = config.judges
    scores = score_answers(
        run,
        config.rewards.by_axis(),
        {name: judge.model for name, judge in judges.items()},
        quantize.compute_precision(config.precision),
        prompts,
        answers,
        paths,
    )
    versions = {}
    for place, version in answers.items():
        versions[place] = describe_version(prompts, dialogs, version, scores[place])

    results = {name: versions[place] for name, place in zip(config.versions, places, strict=True)}
    for name, result in results.items():
        _say(run, f"{name}: {describe_line(prompts, result)}")

    run.write_result(
        summarise(
            prompts,
            results,
            config.conversations,
            {name: path.resolve().name for name, path in config.versions.items()},
            SamplingSettings(
                temperature=config.temperature, top_p=config.top_p, max_tokens=config.max_tokens
            ),
            judges,
            config.name_judges(),
        )
    )
    if run.ranks.is_main:
        lines = []
        for name, result in results.items():
            for row in summary.list_samples(name, prompts, result):
                lines.append(json.dumps(row.model_dump(exclude_defaults=True)) + "\n")

        atomic.write_atomic(run.path / "samples.jsonl", "".join(lines))

    if config.attention:
        talks = results[config.attention[-1]].talks
        load = partial(load_model, config, device=run.ranks.device)
        figure = draw_attention(run, config.versions, config.attention, load, dialogs, talks)
        if figure is not None:
            run.write_result(AttentionResult(**figure))


def summarise(
    prompts: Sequence[Prompt],
    versions: Mapping[str, summary.Version],
    conversations: int,
    checkpoints: Mapping[str, str],
    sampling: SamplingSettings,
    judges: Mapping[str, OtherJudge] | None = None,
    judge_names: Mapping[str, str] | None = None,
) -> EvaluateResult:
    """Summarise what versions, in the order in which they were made, said to the same prompts."""
    kinds = [classify(prompt) for prompt in prompts]
    axes = {name: judge.axis for name, judge in (judges or {}).items()}
    talks = {name: version.talks[0] for name, version in versions.items() if version.talks}
    results = {}
    for name, version in versions.items():
        results[name] = summary.measure(prompts, kinds, version, axes)

    conducts = {name: version.conducts for name, version in versions.items()}
    known = {name: conduct for name, conduct in conducts.items() if conduct is not None}
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
        other_win_rates=list(summary.compare_by_others(kinds, versions, axes)),
        judges=dict(judge_names or {}),
        conduct_differences=list(compare_conduct(kinds, known)) if known else [],
        conduct_judges=describe_judges() if known else [],
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

    for name in config.judges:
        if name in config.rewards.by_axis():
            raise UserError(
                f"judges.{name}: `rewards` has a reward model of this name",
                "give the judge another name",
            )

    if config.attention and not config.ghost:
        raise UserError(
            "attention needs `ghost`", "give the file of dialogs under a lasting instruction"
        )

    for path in config.list_judges():
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


def _say(run: runs.Run, line: str) -> None:
    if run.ranks.is_main:
        say(line)
