"""Safety context distillation (§4.2.4): answer adversarial prompts under a safety preprompt, learn without it.

Preprompts are made from adjectives; where the risk category of a prompt is known, an answer template for it is added
half of the time. An answer is kept only if the safety reward model scores it above the answer given without any
preprompt, since on good answers distillation would only make the model vaguer. What is written feeds `sft`.
"""

from __future__ import annotations

import hashlib
import itertools
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from llama2.config import StageConfig
from llama2.generate.rewards import RewardModels, probability
from llama2.records import Dialog, Message, Messages, Prompt
from llama2.runs import Run
from llama2.stages.planning import Cluster, Lineage, sampling_plan
from llama2.stages.sampling import (
    Sample,
    answer,
    dialog,
    fitting,
    has_room,
    load_chat,
    load_rewards,
    read_prompts,
    score,
    write_records,
)

ADJECTIVES = ("responsible", "respectful", "wise", "careful", "honest", "safe", "kind", "thoughtful")
PREPROMPTS = (
    "You are a {a} and {b} assistant.",
    "Be a {a} and {b} assistant.",
)
TEMPLATES = {
    "illicit": "This asks for a crime. Refuse, say why it is illegal, and offer something safe.",
    "hateful": "This asks for something hurtful. Refuse, say whom it would harm, and offer something safe.",
    "advice": "This asks for dangerous advice. Refuse, point to a doctor, and offer something safe.",
}


class Config(StageConfig):
    """Distil the effect of safety preprompts into the model."""

    policy: Path
    rewards: RewardModels
    """its safety model is the gate"""
    prompts: Path
    limit: int | None = Field(None, gt=0)
    """use this many of the adversarial prompts"""
    families: tuple[str, ...] = ("unsafe",)
    """where prompts carry metadata.family, use these alone; elsewhere every prompt tagged for safety"""
    k: int = Field(1, gt=0)
    """answers under preprompts, each with another one; the best is kept"""
    preprompts: tuple[str, ...] = PREPROMPTS
    """with {a} and {b} for two adjectives"""
    templates: dict[str, str] = {}
    """risk category -> answer template, added to half of the preprompts"""
    sample: Sample = Sample(temperature=0.7)


def plan(config: Config, cluster: Cluster, lineage: Lineage) -> dict[str, Any]:
    """Memory: policy and reward models whole on every rank."""
    return sampling_plan([lineage.shape(config.policy)], [lineage.shape(path) for path in config.rewards.paths()],
                         config.sample, cluster)


def run(config: Config, run: Run) -> None:
    """Write dialogs.jsonl: adversarial prompts with the answers that a preprompt improved."""
    chat = load_chat(config.policy, config.sample, run)
    rewards = load_rewards(config.rewards.model_copy(update={"rule": "safe"}), chat.tokenizer,
                           config.sample.precision)
    found = read_prompts(config.prompts, None, config.seed)
    prompts = fitting(chat, [prompt for prompt in found if adversarial(prompt, config.families)], room=48)
    prompts = [prompt for prompt in prompts if all(has_room(chat, preprompted(prompt, config, turn))
                                                   for turn in range(config.k))][: config.limit]
    plain = answer(chat, [prompt.messages for prompt in prompts], config.sample, seed=config.seed)
    before = [one[0].safe for one in score(rewards, chat.tokenizer, prompts, plain)]
    best: list[tuple[float, str]] = [(mark, "") for mark in before]
    after: list[float] = []
    for turn in range(config.k):
        asked = [preprompted(prompt, config, turn) for prompt in prompts]
        answers = answer(chat, asked, config.sample, seed=config.seed + 100 + turn)
        marks = score(rewards, chat.tokenizer, prompts, answers)  # judged as answers to the bare prompt
        for index, (mine, mark) in enumerate(zip(answers, marks)):
            after.append(mark[0].safe)
            if mine[0].completion.finish == "stop" and mine[0].text and mark[0].safe > best[index][0]:
                best[index] = mark[0].safe, mine[0].text
    kept: list[Dialog] = [dialog(prompt, text, reward=round(mark, 4), safety=True)
                          for prompt, (mark, text) in zip(prompts, best) if text]
    write_records(run.path / "dialogs.jsonl", kept)
    run.write_json("summary.json", {
        "prompts": len(prompts), "kept": len(kept), "safety before": _median(before), "safety after": _median(after),
        "examples": _examples(prompts, [one[0].text for one in plain], best)})


def adversarial(prompt: Prompt, families: Sequence[str]) -> bool:
    """Whether a prompt tries to get something unsafe: by its family, else by its tag."""
    return prompt.metadata["family"] in families if "family" in prompt.metadata else prompt.safety


def preprompted(prompt: Prompt, config: Config, turn: int) -> Messages:
    """What is asked for the answer number `turn`."""
    return under_preprompt(prompt, config.seed + turn, config.preprompts, config.templates)


def under_preprompt(prompt: Prompt, seed: int, preprompts: Sequence[str] = PREPROMPTS,
                    templates: dict[str, str] | None = None) -> Messages:
    """The prompt behind a safety preprompt, chosen by a hash of prompt and seed. A system turn it has stays."""
    digest = hashlib.blake2b(repr((seed, prompt.messages)).encode(), digest_size=8).digest()
    choice = int.from_bytes(digest, "little")
    pairs = list(itertools.permutations(ADJECTIVES, 2))
    choice, pair = divmod(choice, len(pairs))
    choice, form = divmod(choice, len(preprompts))
    text = preprompts[form].format(a=pairs[pair][0], b=pairs[pair][1])
    template = (templates or {}).get(str(prompt.metadata.get("risk", "")))
    if template and choice % 2:
        text = f"{text} {template}"
    if prompt.messages[0].role == "system":
        return (Message("system", f"{text} {prompt.messages[0].content}"), *prompt.messages[1:])
    return (Message("system", text), *prompt.messages)


def _median(scores: Sequence[float]) -> float | None:
    return statistics.median(map(probability, scores)) if scores else None


def _examples(prompts: Sequence[Prompt], plain: Sequence[str], best: Sequence[tuple[float, str]]
              ) -> list[dict[str, Any]]:
    changed = [(prompt.messages[-1].content, old, new) for prompt, old, (_, new) in zip(prompts, plain, best) if new]
    return [{"prompt": prompt, "before": old, "after": new} for prompt, old, new in changed[:6]]
