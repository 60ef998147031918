"""Human preference data (§3.2.1): two answers a prompt, from different models and temperatures,
compared.

Annotators compare the answers (`judging.Annotators`): those of the microworld, where prompts carry
their own truth. Pairs that nobody has compared yet are written as they are to be shown to people,
and once judged are the same records. Besides plain pairs two kinds are worth asking for, because
reward models that have never seen them are easily fooled: an answer that belongs to another prompt,
and an answer given under a safety preprompt, which is more often a refusal. As in the paper some
comparisons of every round are held out, by their prompts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from llama2.config import StageConfig
from llama2.data.split import is_heldout
from llama2.evaluate.judges import classify
from llama2.generate.dialogue import Chat
from llama2.hashing import hash_fraction
from llama2.judging import Annotators, ComparisonRequest
from llama2.records import DEGREES, Axis, Messages, Pair, Preference, Prompt, Response
from llama2.results import CollectResult
from llama2.runs import Run
from llama2.runs.parts import Work
from llama2.stages.common.judges import NOISE, make_annotators
from llama2.stages.common.planning import Cluster, PlannedRuns, plan_sampling
from llama2.stages.common.preprompts import PREPROMPTS, check, under_preprompt
from llama2.stages.common.sampling import (
    Sample,
    answer,
    keep_fitting,
    load_chat,
    open_records,
    read_prompts,
    sample_in_parts,
    seed_use,
)
from llama2.tally import Tally

ROOM = 16  # tokens that an answer needs
SHOWN = ("family", "split", "risk", "source", "category")  # what a pair tells of its prompt


class Config(StageConfig):
    """Collect comparisons: of simulated annotators where prompts carry truth, else pairs for people
    to judge."""

    policies: Annotated[tuple[Path, ...], Field(min_length=1, max_length=2)]
    """one model, or two variants to compare"""
    prompts: Path
    limit: int | None = Field(None, gt=0)
    temperatures: tuple[float, float] = (1.0, 0.7)
    """of the first and the second answer"""
    swapped: float = Field(0.0, ge=0, le=1)
    """share of pairs in which one answer belongs to another prompt"""
    preprompted: float = Field(0.0, ge=0, le=1)
    """share of pairs on unsafe and borderline prompts in which one answer is given under a safety
    preprompt"""
    preprompts: tuple[str, ...] = PREPROMPTS
    """the safety preprompts, with {a} and {b} for two adjectives"""
    both_axes: float = Field(0.0, ge=0, le=1)
    """share of comparisons of unsafe prompts that are made on the helpfulness axis as well"""
    heldout: float = Field(0.1, ge=0, lt=1)
    """share of the prompts (by their first user turn) whose comparisons are held out, in every
    round alike"""
    noise: float = Field(NOISE, ge=0)
    """of the simulated annotators: deviation of the difference that they perceive"""
    round: int = Field(0, ge=0)
    sample: Sample = Sample()

    _fields = field_validator("preprompts")(check)

    @model_validator(mode="after")
    def _one_server(self) -> Config:
        if self.sample.server is not None and len(set(self.policies)) > 1:
            raise ValueError("sample.server answers for one model: give one policy, or sample here")

        return self


def plan(config: Config, cluster: Cluster, planned: PlannedRuns) -> dict[str, Any]:
    """Return memory: the policies whole on every rank."""
    return plan_sampling(
        [planned.shape(path) for path in config.policies], [], config.sample, cluster
    )


def run(config: Config, run: Run) -> None:
    """Write preferences.jsonl, heldout.jsonl and summary.json, and pairs.jsonl of prompts that
    carry no truth."""
    prompts = read_prompts(config.prompts, config.limit, config.seed)
    chats = {path: load_chat(path, config.sample, run) for path in config.policies}
    narrow = min(chats.values(), key=lambda chat: chat.engine.context)
    prompts = keep_fitting(narrow, prompts, ROOM, run.tally("prompts"))
    pairs = zip(prompts, sample_pairs(config, run, chats, prompts), strict=True)
    annotators = make_annotators(config.seed, config.noise)
    desk = Desk(config, annotators, run.tally("comparisons"))
    accepted = [annotators.accepts(prompt) for prompt in prompts]

    with ExitStack() as files:
        put: dict[str, Callable[[object], None]] = {}

        def open_file(name: str) -> None:
            if name not in put:
                put[name] = files.enter_context(open_records(run.path / f"{name}.jsonl", run.ranks))

        for name in ("preferences", "heldout") if any(accepted) else ():
            open_file(name)

        if not all(accepted):
            open_file("pairs")

        for name, record in desk.compare(pairs):
            open_file(name)
            put[name](record)

    run.write_result(desk.result())


class Desk:
    """Comparisons of pairs: on which axes, by whom, and what they come to."""

    def __init__(self, config: Config, annotators: Annotators, tally: Tally) -> None:
        self.config, self.annotators, self.tally = config, annotators, tally
        self.counts: dict[str, Counter[str]] = {
            name: Counter() for name in ("degree", "axis", "safety", "file")
        }

    def compare(
        self, pairs: Iterable[tuple[Prompt, tuple[Response, Response]]]
    ) -> Iterator[tuple[str, Preference | Pair]]:
        """Yield what comes of each pair, with the name of the file that it belongs to."""
        for comparison, outcome in self.annotators.compare(self._comparisons(pairs)):
            if isinstance(outcome, Preference):
                yield self._judged(outcome)
            elif outcome == "pending":
                self.tally.skip("not judged yet", "they are in pairs.jsonl, for people to judge")
                self.counts["file"]["pairs"] += 1
                yield "pairs", make_pair(comparison, self.config.seed)
            else:
                self.tally.skip("the chosen answer alone is unsafe")

    def _comparisons(
        self, pairs: Iterable[tuple[Prompt, tuple[Response, Response]]]
    ) -> Iterator[ComparisonRequest]:
        """Yield the comparisons to ask for: none of equal answers or of an empty one."""
        for place, (prompt, answers) in enumerate(pairs):
            texts = {answer.text for answer in answers}
            for axis in choose_axes(self.config, prompt, place):
                self.tally.read += 1
                if len(texts) == 1:
                    self.tally.skip("equal answers")
                elif "" in texts:
                    self.tally.skip("an empty answer")
                else:
                    yield ComparisonRequest(prompt, answers, axis, self.config.round)

    def _judged(self, preference: Preference) -> tuple[str, Preference]:
        self.tally.kept += 1
        heldout = is_heldout(preference.prompt, self.config.heldout)
        name = "heldout" if heldout else "preferences"

        self.counts["file"][name] += 1
        self.counts["degree"][preference.degree] += 1
        self.counts["axis"][preference.axis] += 1
        if preference.safety is not None:
            self.counts["safety"][preference.safety] += 1

        return name, preference

    def result(self) -> CollectResult:
        """Return the number of comparisons by file, degree, axis and safety label."""
        file = self.counts["file"]
        return CollectResult(
            pairs=file["preferences"],
            heldout=file["heldout"],
            unjudged=file["pairs"],
            dropped=self.tally.read - self.tally.kept - file["pairs"],
            degrees={degree: self.counts["degree"][degree] for degree in DEGREES},
            axes=dict(self.counts["axis"]),
            safety=dict(self.counts["safety"]),
        )


def make_pair(comparison: ComparisonRequest, seed: int) -> Pair:
    """Return a comparison as it is to be shown: its texts draw which answer stands first."""
    prompt, axis = comparison.prompt, comparison.axis
    first, second = sorted(comparison.answers, key=lambda answer: answer.text)
    turns = [message.content for message in prompt.messages]
    chance = hash_fraction(repr((seed, axis, turns, first.text, second.text)))
    tags = {key: prompt.metadata[key] for key in SHOWN if key in prompt.metadata}

    return Pair(
        comparison.id,
        prompt.messages,
        (first, second) if chance < 0.5 else (second, first),
        axis=axis,
        round=comparison.round,
        metadata={"prompt": prompt.id, **tags},
    )


def choose_axes(config: Config, prompt: Prompt, place: int) -> tuple[Axis, ...]:
    """Choose what a pair is compared for: safety if it probes it; help for all harmless prompts,
    and a share of the unsafe."""
    kind = classify(prompt)
    if kind == "helpful":
        return ("helpful",)

    both = kind == "borderline" or hash_fraction(f"{config.seed} both {place}") < config.both_axes
    return ("safe", "helpful") if both else ("safe",)


def sample_pairs(
    config: Config, run: Run, chats: Mapping[Path, Chat], prompts: Sequence[Prompt]
) -> Iterator[tuple[Response, Response]]:
    """Yield two answers to every prompt, some of them swapped for another prompt's or given under a
    preprompt.

    What is swapped is the second answer, for that of the last prompt before it that is swapped too;
    the first of them keeps its own.
    """
    first = Response("", config.policies[0].name, config.temperatures[0])
    second = Response("", config.policies[-1].name, config.temperatures[1])
    engines = [chats[path] for path in dict.fromkeys(config.policies)]
    work = make_sampler(config, chats)
    rows = sample_in_parts(run, engines, "samples", prompts, work, config.sample, 2)
    waiting: str | None = None

    for place, (text, other) in enumerate(rows):
        swapped = other
        if hash_fraction(f"{config.seed} swapped {config.round} {place}") < config.swapped:
            swapped = other if waiting is None else waiting
            waiting = other

        yield replace(first, text=text), replace(second, text=swapped)


def make_sampler(config: Config, chats: Mapping[Path, Chat]) -> Work[Prompt]:
    """Return what makes a row of each prompt: the texts of its two answers."""

    def work(prompts: Sequence[Prompt], first: int) -> list[list[str]]:
        places = range(first, first + len(prompts))
        plain = [prompt.messages for prompt in prompts]
        first_chat, second_chat = chats[config.policies[0]], chats[config.policies[-1]]
        preprompted = [
            add_preprompt(config, second_chat, prompt, place)
            for prompt, place in zip(prompts, places)
        ]
        texts = []
        for side, (chat, messages) in enumerate(((first_chat, plain), (second_chat, preprompted))):
            answers = answer(
                chat,
                messages,
                config.sample,
                temperature=config.temperatures[side],
                indices=places,
                seed=seed_use(config.seed, "side", side, config.round),
            )
            texts.append([row[0].text for row in answers])

        return [list(pair) for pair in zip(*texts)]

    return work


def add_preprompt(config: Config, chat: Chat, prompt: Prompt, place: int) -> Messages:
    """Return what the second answer is given to: the prompt, or the prompt under a safety
    preprompt."""
    chance = hash_fraction(f"{config.seed} preprompted {config.round} {place}")
    if classify(prompt) == "helpful" or chance >= config.preprompted:
        return prompt.messages

    seed = seed_use(config.seed, "preprompt", config.round)
    under = under_preprompt(prompt, seed, config.preprompts, {})
    return under if chat.has_room(under, ROOM) else prompt.messages
