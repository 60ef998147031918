"""Human preference data (§3.2.1): two answers a prompt, from different models and temperatures,
compared.

Where prompts carry the truth about themselves (the microworld's do), annotators are simulated, who
see it through noise; other pairs are written as they are to be shown to people, and once judged are
the same records. Besides plain pairs two kinds are worth asking for, because reward models that
have never seen them are easily fooled: an answer that belongs to another prompt, and an answer
given under a safety preprompt, which is more often a refusal. As in the paper some comparisons of
every round are held out, by their prompts.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from llama2.config import StageConfig
from llama2.data.split import is_heldout
from llama2.evaluate.judges import has_truth, kind_of
from llama2.generate.dialogue import Chat
from llama2.microworld.annotators import NOISE, Annotator
from llama2.records import DEGREES, Axis, Messages, Pair, Preference, Prompt, Response
from llama2.runs import Run
from llama2.runs.parts import Work
from llama2.stages.common.planning import Cluster, Lineage, sampling_plan
from llama2.stages.common.preprompts import PREPROMPTS, check, under_preprompt
from llama2.stages.common.sampling import (
    Sample,
    answer,
    derive_seed,
    keep_fitting,
    load_chat,
    open_records,
    read_prompts,
    sample_in_parts,
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


def plan(config: Config, cluster: Cluster, lineage: Lineage) -> dict[str, Any]:
    """Memory: the policies whole on every rank."""
    return sampling_plan(
        [lineage.shape(path) for path in config.policies], [], config.sample, cluster
    )


def run(config: Config, run: Run) -> None:
    """Write preferences.jsonl, heldout.jsonl and summary.json, and pairs.jsonl of prompts that
    carry no truth."""
    prompts = read_prompts(config.prompts, config.limit, config.seed)
    chats = {path: load_chat(path, config.sample, run) for path in config.policies}
    narrow = min(chats.values(), key=lambda chat: chat.engine.context)
    prompts = keep_fitting(narrow, prompts, ROOM, run.tally("prompts"))
    pairs = zip(prompts, sampled(config, run, chats, prompts), strict=True)
    desk = Desk(config, run.tally("comparisons"))
    told = [has_truth(prompt) for prompt in prompts]

    with ExitStack() as files:
        put = {
            name: files.enter_context(open_records(run.path / f"{name}.jsonl", run.ranks))
            for name in (
                *(("preferences", "heldout") if any(told) else ()),
                *(() if all(told) else ("pairs",)),
            )
        }
        for place, (prompt, responses) in enumerate(pairs):
            for name, record in desk.compare(prompt, responses, place):
                put[name](record)

    run.write_json("summary.json", desk.summary())


class Desk:
    """Where pairs are compared: on which axes, by whom, and what they come to."""

    def __init__(self, config: Config, tally: Tally) -> None:
        self.config, self.tally = config, tally
        self.annotator = Annotator(config.seed, noise=config.noise)
        self.counts: dict[str, Counter[str]] = {
            name: Counter() for name in ("degree", "axis", "safety", "file")
        }

    def compare(
        self, prompt: Prompt, responses: tuple[Response, Response], place: int
    ) -> Iterator[tuple[str, Preference | Pair]]:
        """The comparisons of one pair, each with the name of the file that it belongs to."""
        for axis in axes(self.config, prompt, place):
            self.tally.read += 1
            texts = {one.text for one in responses}
            if len(texts) == 1 or "" in texts:
                self.tally.skip("equal answers" if len(texts) == 1 else "an empty answer")
            elif not has_truth(prompt):
                self.tally.skip(
                    "of prompts without truth, for people to judge", "they are in pairs.jsonl"
                )
                self.counts["file"]["pairs"] += 1
                yield "pairs", self._unjudged(prompt, responses, axis)
            else:
                yield from self._judged(prompt, responses, axis)

    def _judged(
        self, prompt: Prompt, responses: tuple[Response, Response], axis: Axis
    ) -> Iterator[tuple[str, Preference]]:
        one = self.annotator.compare(prompt, responses, axis, self.config.round)
        if one is None:
            self.tally.skip("the chosen answer alone is unsafe")
            return

        self.tally.kept += 1
        name = "heldout" if is_heldout(prompt.messages, self.config.heldout) else "preferences"
        for kind, value in (
            ("degree", one.degree),
            ("axis", one.axis),
            ("safety", one.safety),
            ("file", name),
        ):
            self.counts[kind][str(value)] += value is not None

        yield name, one

    def _unjudged(self, prompt: Prompt, responses: tuple[Response, Response], axis: Axis) -> Pair:
        """A pair as it is to be shown: which answer stands first is drawn from the texts."""
        said = [message.content for message in prompt.messages]
        low, high = sorted(responses, key=lambda one: one.text)
        chance = _unit(repr((self.config.seed, axis, said, low.text, high.text)))
        identity = f"{axis}-{int(_unit(repr((axis, said, low.text, high.text))) * 16**12):012x}"

        return Pair(
            identity,
            prompt.messages,
            (low, high) if chance < 0.5 else (high, low),
            axis=axis,
            round=self.config.round,
            metadata={
                "prompt": prompt.id,
                **{key: prompt.metadata[key] for key in SHOWN if key in prompt.metadata},
            },
        )

    def summary(self) -> dict[str, Any]:
        """Plain JSON: comparisons by file, degree, axis and safety label."""
        file = self.counts["file"]
        return {
            "pairs": file["preferences"],
            "heldout": file["heldout"],
            "unjudged": file["pairs"],
            "dropped": self.tally.read - self.tally.kept - file["pairs"],
            "degrees": {degree: self.counts["degree"][degree] for degree in DEGREES},
            "axes": {axis: count for axis, count in self.counts["axis"].items() if count},
            "safety": {label: count for label, count in self.counts["safety"].items() if count},
        }


def axes(config: Config, prompt: Prompt, place: int) -> tuple[Axis, ...]:
    """What a pair is compared for: safety if it probes it; help for all harmless prompts, and a
    share of the unsafe."""
    kind = kind_of(prompt)
    if kind == "helpful":
        return ("helpful",)

    both = kind == "borderline" or _unit(f"{config.seed} both {place}") < config.both_axes
    return ("safe", "helpful") if both else ("safe",)


def sampled(
    config: Config, run: Run, chats: Mapping[Path, Chat], prompts: Sequence[Prompt]
) -> Iterator[tuple[Response, Response]]:
    """Two answers to every prompt, some of them swapped for another prompt's or given under a
    preprompt.

    What is swapped is the second answer, for that of the last prompt before it that is swapped too;
    the first of them keeps its own.
    """
    first, second = (
        Response("", path.name, temperature)
        for path, temperature in zip((config.policies[0], config.policies[-1]), config.temperatures)
    )
    policies = list(dict.fromkeys(config.policies))
    rows = sample_in_parts(
        run,
        [chats[path] for path in policies],
        "samples",
        prompts,
        sampler(config, chats),
        config.sample,
        2,
    )
    waiting: str | None = None

    for place, (one, other) in enumerate(rows):
        text = other
        if _unit(f"{config.seed} swapped {config.round} {place}") < config.swapped:
            text, waiting = (other if waiting is None else waiting), other

        yield replace(first, text=one), replace(second, text=text)


def sampler(config: Config, chats: Mapping[Path, Chat]) -> Work[Prompt]:
    """What makes a row of each prompt: the texts of its two answers."""

    def work(prompts: Sequence[Prompt], first: int) -> list[list[str]]:
        places = range(first, first + len(prompts))
        sides = []
        for side, path in enumerate((config.policies[0], config.policies[-1])):
            asked = [
                second_asked(config, chats[path], prompt, place) if side else prompt.messages
                for prompt, place in zip(prompts, places)
            ]
            found = answer(
                chats[path],
                asked,
                config.sample,
                temperature=config.temperatures[side],
                indices=places,
                seed=derive_seed(config.seed, "side", side, config.round),
            )
            sides.append([one[0].text for one in found])

        return [list(texts) for texts in zip(*sides)]

    return work


def second_asked(config: Config, chat: Chat, prompt: Prompt, place: int) -> Messages:
    """What the second answer is given to: the prompt, or the prompt under a safety preprompt."""
    if (
        kind_of(prompt) == "helpful"
        or _unit(f"{config.seed} preprompted {config.round} {place}") >= config.preprompted
    ):
        return prompt.messages

    under = under_preprompt(
        prompt, derive_seed(config.seed, "preprompt", config.round), config.preprompts, {}
    )
    return under if chat.has_room(under, ROOM) else prompt.messages


def _unit(key: str) -> float:
    """A number in [0, 1) that depends on `key` alone."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little") / 2**64
