"""Human preference data (§3.2.1): two answers a prompt, from different models and temperatures, compared.

Here the annotators are simulated (they see the microworld's truth through noise); pages for people come with the
annotation server and write the same records. Besides plain pairs two kinds are worth asking for, because reward
models that have never seen them are easily fooled: an answer that belongs to another prompt, and an answer given
under a safety preprompt, which is more often a refusal. As in the paper some comparisons of every round are held out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field, model_validator

from llama2.config import StageConfig
from llama2.data.split import is_heldout
from llama2.evaluate.judges import kind_of
from llama2.generate.dialogue import Chat
from llama2.preferences.simulated import NOISE, Annotator
from llama2.records import DEGREES, Axis, Preference, Prompt, Response
from llama2.runs import Run
from llama2.stages.distill import under_preprompt
from llama2.stages.planning import Cluster, Lineage, sampling_plan
from llama2.stages.sampling import Sample, answer, fitting, has_room, load_chat, read_prompts, write_records


class Config(StageConfig):
    """Collect comparisons from simulated annotators."""

    policies: Annotated[tuple[Path, ...], Field(min_length=1, max_length=2)]
    """one model, or two variants to compare"""
    prompts: Path
    limit: int | None = Field(None, gt=0)
    temperatures: tuple[float, float] = (1.0, 0.7)
    """of the first and the second answer"""
    swapped: float = Field(0.0, ge=0, le=1)
    """share of pairs in which one answer belongs to another prompt"""
    preprompted: float = Field(0.0, ge=0, le=1)
    """share of pairs on unsafe and borderline prompts in which one answer is given under a safety preprompt"""
    both_axes: float = Field(0.0, ge=0, le=1)
    """share of comparisons of unsafe prompts that are made on the helpfulness axis as well"""
    heldout: float = Field(0.1, ge=0, lt=1)
    """share of the conversations whose comparisons go to heldout.jsonl: the same ones in every round"""
    noise: float = Field(NOISE, ge=0)
    round: int = Field(0, ge=0)
    sample: Sample = Sample()

    @model_validator(mode="after")
    def _one_server(self) -> Config:
        if self.sample.server is not None and len(set(self.policies)) > 1:
            raise ValueError("sample.server answers for one model: give one policy, or sample here")
        return self


def plan(config: Config, cluster: Cluster, lineage: Lineage) -> dict[str, Any]:
    """Memory: the policies whole on every rank."""
    return sampling_plan([lineage.shape(path) for path in config.policies], [], config.sample, cluster)


def run(config: Config, run: Run) -> None:
    """Write preferences.jsonl, heldout.jsonl and summary.json."""
    prompts = read_prompts(config.prompts, config.limit, config.seed)
    chats = [load_chat(path, config.sample, run) for path in dict.fromkeys(config.policies)]
    prompts = fitting(chats[0], prompts, room=16)
    pairs = list(zip(prompts, sampled(config, chats, prompts)))
    annotator = Annotator(config.seed, noise=config.noise)
    asked: Counter[str] = Counter()
    judged: list[Preference] = []
    probing = [pair for pair in pairs if kind_of(pair[0]) != "helpful"]
    for axis, some in (("safe", probing), ("helpful", list(helpful(config, pairs)))):
        found = list(annotator.compare_all(some, _axis(axis), config.round))
        asked["asked"] += len(some)
        judged += found
    aside = [is_heldout(one.prompt, config.heldout) for one in judged]
    kept = [one for one, out in zip(judged, aside) if not out]
    write_records(run.path / "preferences.jsonl", kept)
    write_records(run.path / "heldout.jsonl", [one for one, out in zip(judged, aside) if out])
    run.write_json("summary.json", {
        "pairs": len(kept), "heldout": len(judged) - len(kept), "dropped": asked["asked"] - len(judged),
        "degrees": {degree: sum(one.degree == degree for one in judged) for degree in DEGREES},
        "axes": dict(Counter(one.axis for one in judged)),
        "safety": dict(Counter(one.safety for one in judged if one.safety))})


def _axis(name: str) -> Axis:
    return "safe" if name == "safe" else "helpful"


def helpful(config: Config, pairs: Sequence[tuple[Prompt, tuple[Response, Response]]]
            ) -> Iterator[tuple[Prompt, tuple[Response, Response]]]:
    """The pairs judged on helpfulness: all harmless prompts, borderline ones among them, and a share of the unsafe."""
    generator = np.random.default_rng([config.seed, 3])
    for prompt, responses in pairs:
        if kind_of(prompt) != "unsafe" or generator.random() < config.both_axes:
            yield prompt, responses


def sampled(config: Config, chats: Sequence[Chat], prompts: Sequence[Prompt]) -> list[tuple[Response, Response]]:
    """Two answers to every prompt, some of them swapped for another prompt's or given under a preprompt."""
    generator = np.random.default_rng([config.seed, config.round])
    names = [path.name for path in config.policies]
    sides: list[list[str]] = []
    for side in range(2):
        asked = [prompt.messages for prompt in prompts]
        if side == 1:
            chances = generator.random(len(prompts))
            other = [under_preprompt(prompt, config.seed) for prompt in prompts]
            asked = [new if kind_of(prompt) != "helpful" and chance < config.preprompted and has_room(chats[0], new)
                     else prompt.messages for prompt, new, chance in zip(prompts, other, chances)]
        found = answer(chats[side % len(chats)], asked, config.sample, seed=2 * config.seed + side,
                       temperature=config.temperatures[side])
        sides.append([one[0].text for one in found])
    swap = np.flatnonzero(generator.random(len(prompts)) < config.swapped)
    moved = [sides[1][index] for index in np.roll(swap, 1)]
    for index, text in zip(swap, moved):
        sides[1][index] = text
    return [(Response(first, names[0], config.temperatures[0]), Response(second, names[-1], config.temperatures[1]))
            for first, second in zip(*sides)]


