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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from llama2 import atomic, mesh, records, runs
from llama2 import config as configuration
from llama2.errors import UserError
from llama2.evaluate import attention, ghost, summary
from llama2.evaluate.judges import known_truth, truth
from llama2.formats.checkpoint import config_of
from llama2.generate.dialogue import Answer, Chat
from llama2.generate.engine import Engine
from llama2.generate.remote import Server, connect
from llama2.generate.rewards import probability
from llama2.generate.sampling import Sampling
from llama2.model import quantize
from llama2.model.llama import Llama
from llama2.records import Axis, Message, Messages, Prompt
from llama2.runs.parts import in_parts
from llama2.stages.common.answers import (
    ROUNDS,
    answered,
    check_judge,
    fitting,
    in_turn,
    judged,
    twins,
)
from llama2.stages.common.planning import Cluster, Lineage, judging_plan
from llama2.stages.common.training import load_policy
from llama2.terminal_text import say
from llama2.tokenizer import chat_settings
from llama2.tokenizer.template import check_template
from llama2.tokenizer.tokenizer import Tokenizer


class Judges(configuration.Config):
    """The reward models that judge; each is optional."""

    helpful: Path | None = None
    """reward model of helpfulness"""
    safe: Path | None = None
    """reward model of safety"""

    def by_axis(self) -> dict[Axis, Path]:
        """Those that are given."""
        found: dict[Axis, Path | None] = {"helpful": self.helpful, "safe": self.safe}
        return {axis: path for axis, path in found.items() if path is not None}


class Config(configuration.StageConfig):
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

    def sampling(self, seed: int, temperature: float | None = None) -> Sampling:
        """How answers are drawn; greedy at temperature 0."""
        return Sampling(
            self.temperature if temperature is None else temperature,
            self.top_p,
            max_tokens=self.max_tokens,
            seed=seed,
        )


@dataclass(frozen=True)
class Said:
    """All that one version said: an answer to each prompt, greedy ones, dialogs by where their
    instruction stood."""

    answers: list[Answer]
    greedy: list[Answer] | None = None
    talks: dict[ghost.Place, list[Messages]] = field(default_factory=dict)


def plan(config: Config, cluster: Cluster, lineage: Lineage) -> dict[str, Any]:
    """Memory: one version after the other, then one reward model after the other."""
    local = {path for name, path in config.versions.items() if name not in config.servers}
    return judging_plan(
        {str(path): lineage.shape(path) for path in local},
        {axis: lineage.shape(path) for axis, path in config.rewards.by_axis().items()},
        config.precision,
        config.slots,
        config.max_tokens,
        cluster,
        whole_context=bool(config.ghost),
        looked_at=bool(config.attention),
    )


def run(config: Config, run: runs.Run) -> None:
    """Writes evaluation.json (figures), samples.jsonl (every answer with its scores),
    attention.json."""
    _check(config)
    paths = list(config.versions.values())
    dialogs = ghost.read(config.ghost, config.ghost_limit) if config.ghost else []
    read = list(records.read(Prompt, config.prompts))[: config.limit]
    prompts = fitting(paths, read, 8, run.tally("prompts"), config.prompts)
    known = known_truth(prompts)

    if 0 < known < len(prompts):
        _say(
            f"{known} of {len(prompts)} prompts carry ground truth: it does not judge, as it must judge all or none"
        )

    first = twins(paths)
    said = {place: _answers(config, place, run, prompts, dialogs) for place in dict.fromkeys(first)}
    scores = {
        axis: judged(
            run,
            f"judge-{axis}",
            path,
            quantize.computing(config.precision),
            prompts,
            {place: one.answers for place, one in said.items()},
            paths,
        )
        for axis, path in config.rewards.by_axis().items()
    }

    found = {
        place: _described(
            config,
            prompts,
            dialogs,
            one,
            {axis: [probability(score) for score in by[place]] for axis, by in scores.items()},
        )
        for place, one in said.items()
    }
    results = {name: found[place] for name, place in zip(config.versions, first, strict=True)}

    for name, result in results.items():
        _say(f"{name}: {_line(result)}")

    run.write_json(
        "evaluation.json",
        summary.describe(prompts, results, config.conversations)
        | {
            "checkpoints": {name: path.resolve().name for name, path in config.versions.items()},
            "sampling": {
                "temperature": config.temperature,
                "top_p": config.top_p,
                "max_tokens": config.max_tokens,
            },
        },
    )
    if mesh.is_main():
        rows = (
            row
            for name, result in results.items()
            for row in summary.samples(name, prompts, result)
        )
        atomic.write_atomic(
            run.path / "samples.jsonl", "".join(json.dumps(row) + "\n" for row in rows)
        )

    if config.attention:
        _attention(config, run, dialogs, results[config.attention[-1]].talks)


def _check(config: Config) -> None:
    """What can be refused before anything is loaded."""
    unknown = [name for name in config.attention if name not in config.versions]
    if unknown:
        raise UserError(
            f"attention: there is no version '{unknown[0]}'",
            f"versions: {', '.join(config.versions)}",
        )
    if strange := [name for name in config.servers if name not in config.versions]:
        raise UserError(
            f"servers: there is no version '{strange[0]}'",
            f"versions: {', '.join(config.versions)}",
        )
    if config.attention and not config.ghost:
        raise UserError(
            "attention needs `ghost`", "give the file of dialogs under a lasting instruction"
        )

    for path in config.rewards.by_axis().values():
        check_judge(path)


def _answers(
    config: Config,
    place: int,
    run: runs.Run,
    prompts: Sequence[Prompt],
    dialogs: Sequence[ghost.Dialog],
) -> Said:
    """All that the version at this place has to say."""
    begin, name = time.monotonic(), list(config.versions)[place]
    asked = [prompt.messages for prompt in prompts]
    talks: dict[ghost.Place, list[Messages]] = {}

    with in_turn(lambda: _chat(config, name, run)) as chat:
        answers = answered(
            run, f"answers-{place}", chat, asked, config.sampling(config.seed), config.slots
        )
        greedy = (
            answered(
                run,
                f"greedy-{place}",
                chat,
                asked,
                config.sampling(config.seed, temperature=0.0),
                config.slots,
            )
            if config.greedy and known_truth(prompts) == len(prompts)
            else None
        )
        where: tuple[ghost.Place, ...] = ("user", "system")

        for one in where if dialogs else ():

            def hold(some: Sequence[ghost.Dialog], first: int, one: ghost.Place = one) -> list[Any]:
                held = ghost.converse(chat(), some, config.sampling(config.seed), one, first)
                return [[[turn.role, turn.content] for turn in talk] for talk in held]

            rows = in_parts(run, f"talks-{one}-{place}", dialogs, ROUNDS * config.slots, hold)
            talks[one] = [tuple(Message(role, content) for role, content in row) for row in rows]

    _say(f"{name}: answered in {time.monotonic() - begin:.0f} s")
    return Said(answers, greedy, talks)


def _chat(config: Config, name: str, run: runs.Run) -> Chat:
    """A version ready to answer: here, or its server, whose answers are kept until the run is
    finished."""
    checkpoint = config.versions[name]
    check_template(checkpoint, chat_settings.read_chat_template(checkpoint))
    if name in config.servers:
        tokenizer, context = (
            Tokenizer.load(checkpoint),
            config_of(checkpoint).max_position_embeddings,
        )
        kept = run.path / runs.CHECKPOINTS / "answers" / name
        return Chat(connect(config.servers[name], tokenizer, context, state=kept), tokenizer)

    model, tokenizer = _load(config, name)
    engine = Engine(model, slots=config.slots, precision=config.precision)
    engine.test(checkpoint)

    return Chat(engine, tokenizer)


def _load(config: Config, name: str) -> tuple[Llama, Tokenizer]:
    """A version that is only read, its weights as they are computed with."""
    model, tokenizer = load_policy(config.versions[name], quantize.loading(config.precision))
    return model.eval().requires_grad_(False), tokenizer


def _described(
    config: Config,
    prompts: Sequence[Prompt],
    dialogs: Sequence[ghost.Dialog],
    said: Said,
    scores: Mapping[Axis, Sequence[float]],
) -> summary.Version:
    """What the judges think of a version. `scores` are probabilities."""
    ratings, greedy = (
        None if answers is None else truth(prompts, [one.text for one in answers])
        for answers in (said.answers, said.greedy)
    )
    return summary.Version(
        said.answers,
        ratings,
        greedy,
        scores,
        {place: ghost.by_turn(dialogs, talks) for place, talks in said.talks.items()},
        said.talks.get("user", []),
    )


ATTENTION_DIALOGS = 16


def _attention(
    config: Config, run: runs.Run, dialogs: Sequence[ghost.Dialog], said: Sequence[Messages]
) -> None:
    """Figure 10 on the first dialogs, with the answers of the last version asked for; one model
    after the other."""
    talks = [(talk, dialog.instruction) for talk, dialog in zip(said, dialogs, strict=True) if talk]
    talks = talks[:ATTENTION_DIALOGS]
    if not talks:
        return

    names = config.attention
    tokenizer = Tokenizer.load(config.versions[names[-1]])
    context = min(config_of(config.versions[name]).max_position_embeddings for name in names)
    looks: dict[str, list[attention.Look]] = {}

    for name in names:
        with in_turn(lambda name=name: _load(config, name)[0]) as model:  # type: ignore[misc]

            def look(some: Sequence[attention.Talk], first: int) -> list[Any]:
                found = [attention.look(model(), tokenizer, talk, context) for talk in some]
                return [[one.starts, one.map] for one in found]

            place = list(config.versions).index(name)
            looks[name] = [
                attention.Look(*row)
                for row in in_parts(run, f"attention-{place}", talks, len(talks), look)
            ]

    run.write_json("attention.json", attention.figure(looks, tokenizer, talks, context))


def _line(result: summary.Version) -> str:
    parts = [
        f"{sum(len(a.completion.tokens) for a in result.answers) / len(result.answers):.0f} tokens an answer"
    ]
    if result.ratings:
        mean = sum(rating.helpfulness for rating in result.ratings) / len(result.ratings)
        parts.append(f"rated {mean:.3f}")

    parts += [
        f"reward {axis} {sum(scores) / len(scores):.3f}" for axis, scores in result.rewards.items()
    ]
    if "user" in result.ghost:
        parts.append("obeys " + "/".join(f"{turn['rate']:.2f}" for turn in result.ghost["user"]))

    return ", ".join(parts)


def _say(line: str) -> None:
    if mesh.is_main():
        say(line)
