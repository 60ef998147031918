"""Every version of the model on the same held-out prompts (§3.4, §4.4): the data behind Figures 11, 17 and 20.

Versions are given in the order in which they were made; the first is the SFT model. Each answers all prompts once,
sampled as in the paper, and the judges look at the same answers. Win rates leave out ties.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, field_validator

from llama2 import config as configuration
from llama2 import mesh, records, runs
from llama2.errors import UserError
from llama2.evaluate import attention, ghost, summary
from llama2.evaluate.judges import RewardJudge, kind_of, truth
from llama2.generate.dialogue import Answer, Chat
from llama2.generate.engine import Engine
from llama2.generate.remote import Server, connect
from llama2.generate.sampling import Sampling
from llama2.microworld.rater import Rating
from llama2.model import quantize
from llama2.model.checkpoint import CHECKSUMS, config_of, load
from llama2.model.llama import Llama
from llama2.records import Axis, Messages, Prompt
from llama2.tokenizer.template import encode_prompt
from llama2.tokenizer.tokenizer import Tokenizer


class Judges(configuration.Config):
    """The reward models that judge; each is optional."""

    helpful: Path | None = None
    """reward model of helpfulness"""
    safe: Path | None = None
    """reward model of safety"""


class Config(configuration.StageConfig):
    """Compare versions of a model on held-out prompts."""

    versions: dict[str, Path]
    """name -> checkpoint, in the order in which they were made; the first (SFT) is the yardstick"""
    prompts: Path
    """held-out prompts (JSONL); where all carry ground truth (`metadata.gold`) it judges besides the reward models"""
    ghost: Path | None = None
    """dialogs under a lasting instruction (JSONL of prompts with `metadata.instruction` and `.questions`)"""
    rewards: Judges = Judges()
    """reward models that judge"""
    limit: int | None = Field(None, gt=0)
    """use only the first prompts"""
    ghost_limit: int | None = Field(None, gt=0)
    """use only the first dialogs of `ghost`"""
    temperature: float = Field(0.6, ge=0)
    """of the sampled answers; the paper's default for chat"""
    top_p: float = Field(0.9, gt=0, le=1)
    """nucleus of the sampled answers"""
    greedy: bool = True
    """measure helpfulness of greedy answers too (only where there is ground truth)"""
    max_tokens: int = Field(256, gt=0)
    """most tokens of an answer"""
    slots: int = Field(128, gt=0)
    """answers decoded side by side"""
    precision: quantize.WeightPrecision = "bf16"
    """of the versions' weights; int8 and int4 measure what is served so. Reward models judge in bf16 then"""
    """of all matrix products"""
    conversations: int = Field(8, ge=0)
    """prompts whose answers by every version are shown in the report"""
    servers: dict[str, Server] = {}
    """name of a version -> the server that answers for it; the others answer here"""
    attention: tuple[str, ...] = ()
    """versions to draw the attention heat map of (without and with Ghost Attention); needs `ghost`"""

    @field_validator("versions")
    @classmethod
    def _some(cls, versions: dict[str, Path]) -> dict[str, Path]:
        if not versions:
            raise ValueError("at least one version is needed")
        return versions

    def sampling(self, seed: int, temperature: float | None = None) -> Sampling:
        """How answers are drawn; greedy at temperature 0."""
        return Sampling(self.temperature if temperature is None else temperature, self.top_p,
                        max_tokens=self.max_tokens, seed=seed)


def run(config: Config, run: runs.Run) -> None:
    """Writes evaluation.json (figures), samples.jsonl (every answer with its scores), attention.json."""
    _check(config)
    read = list(records.read(Prompt, config.prompts))[: config.limit]
    prompts = fitting(config, read)
    if len(prompts) < len(read):
        _say(f"{len(read) - len(prompts)} of {len(read)} prompts are too long for the context and were left out")
    dialogs = ghost.read(config.ghost, config.ghost_limit) if config.ghost else []
    judges: dict[Axis, RewardJudge] = {}
    if config.rewards.helpful:
        judges["helpful"] = RewardJudge(config.rewards.helpful, quantize.computing(config.precision))
    if config.rewards.safe:
        judges["safe"] = RewardJudge(config.rewards.safe, quantize.computing(config.precision))
    results: dict[str, summary.Version] = {}
    models: dict[str, Llama] = {}
    same: dict[bytes, str] = {}
    for name, checkpoint in config.versions.items():
        begin = time.time()
        needed = name not in config.servers or name in config.attention
        model = load(checkpoint, device=mesh.device()).eval() if needed else None
        twin = same.setdefault(_weights(checkpoint), name)  # a rejected candidate's place is taken by its predecessor
        results[name] = results[twin] if twin in results else _answer(
            config, _chat(config, name, model, run), prompts, dialogs, judges)
        if name in config.attention and model is not None:
            models[name] = model
        _say(f"{name}: {_line(results[name])}  {time.time() - begin:.0f} s")
    run.write_json("evaluation.json", summary.describe(prompts, results, config.conversations) | {
        "checkpoints": {name: str(path) for name, path in config.versions.items()},
        "sampling": {"temperature": config.temperature, "top_p": config.top_p, "max_tokens": config.max_tokens}})
    if mesh.is_main():
        rows = (row for name, result in results.items() for row in samples(name, prompts, result))
        runs.write_atomic(run.path / "samples.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    if models:
        run.write_json("attention.json", _attention(config, models, dialogs, results))


def _check(config: Config) -> None:
    unknown = [name for name in config.attention if name not in config.versions]
    if unknown:
        raise UserError(f"attention: there is no version '{unknown[0]}'", f"versions: {', '.join(config.versions)}")
    if strange := [name for name in config.servers if name not in config.versions]:
        raise UserError(f"servers: there is no version '{strange[0]}'", f"versions: {', '.join(config.versions)}")
    if config.attention and not config.ghost:
        raise UserError("attention needs `ghost`", "give the file of dialogs under a lasting instruction")


def _weights(checkpoint: Path) -> bytes:
    """What tells the weights of two checkpoints apart: their checksums, or the place where there are none."""
    file = checkpoint / CHECKSUMS
    return file.read_bytes() if file.is_file() else str(checkpoint).encode()


def fitting(config: Config, prompts: Sequence[Prompt], room: int = 8) -> list[Prompt]:
    """The prompts that leave every version `room` tokens for its answer."""
    kept = list(prompts)
    for checkpoint in config.versions.values():
        tokenizer, context = Tokenizer.load(checkpoint), config_of(checkpoint).max_position_embeddings
        kept = [prompt for prompt in kept if len(encode_prompt(tokenizer, prompt.messages)) + room <= context]
    if not kept:
        raise UserError(f"{config.prompts}: no prompt is short enough for the context of all versions",
                        "give shorter prompts")
    return kept


def _chat(config: Config, name: str, model: Llama | None, run: runs.Run) -> Chat:
    """A version ready to answer: `model`, or its server, whose answers are kept until the run is finished."""
    checkpoint = config.versions[name]
    tokenizer = Tokenizer.load(checkpoint)
    if name in config.servers:
        context = config_of(checkpoint).max_position_embeddings
        kept = run.path / runs.CHECKPOINTS / "answers" / name
        return Chat(connect(config.servers[name], tokenizer, context, state=kept), tokenizer)
    assert model is not None
    return Chat(Engine(model, slots=config.slots, precision=config.precision), tokenizer)


def _answer(config: Config, chat: Chat, prompts: Sequence[Prompt], dialogs: Sequence[ghost.Dialog],
            judges: Mapping[Axis, RewardJudge]) -> summary.Version:
    """All that one version has to say, and what the judges think of it."""
    asked = [prompt.messages for prompt in prompts]
    answers = [row[0] for row in chat.answers(asked, config.sampling(config.seed))]
    texts = [answer.text for answer in answers]
    ratings = truth(prompts, texts)
    greedy: list[Rating] | None = None
    if ratings is not None and config.greedy:
        sure = [row[0].text for row in chat.answers(asked, config.sampling(config.seed, temperature=0.0))]
        greedy = truth(prompts, sure)
    talks: dict[ghost.Place, list[Messages]] = {}
    places: tuple[ghost.Place, ...] = ("user", "system")
    for place in places if dialogs else ():
        talks[place] = ghost.converse(chat, dialogs, config.sampling(config.seed), place)
    return summary.Version(
        answers, ratings, greedy, {axis: judge.scores(prompts, texts) for axis, judge in judges.items()},
        {place: ghost.by_turn(dialogs, done) for place, done in talks.items()}, talks.get("user", []))


ATTENTION_DIALOGS = 16


def _attention(config: Config, models: dict[str, Llama], dialogs: Sequence[ghost.Dialog],
               results: Mapping[str, summary.Version]) -> dict[str, Any]:
    """Figure 10 on the first dialogs, with the answers of the last version asked for."""
    last = config.attention[-1]
    talks = [(talk, dialog.instruction) for talk, dialog in zip(results[last].talks, dialogs, strict=True) if talk]
    if not talks:
        return {}
    models = {name: models[name] for name in config.attention}
    with torch.inference_mode(), mesh.autocast(quantize.computing(config.precision)):
        return attention.compare(models, Tokenizer.load(config.versions[last]), talks[:ATTENTION_DIALOGS])


def samples(version: str, prompts: Sequence[Prompt], result: summary.Version) -> list[dict[str, Any]]:
    """One row of samples.jsonl for each prompt: the answer and all that is known about it."""
    rows = []
    for index, (prompt, answer) in enumerate(zip(prompts, result.answers, strict=True)):
        rating = result.ratings[index] if result.ratings else None
        rows.append({
            "version": version, "id": prompt.id, "kind": kind_of(prompt), "family": prompt.metadata.get("family"),
            "prompt": [[message.role, message.content] for message in prompt.messages], "answer": answer.text,
            "tokens": len(answer.completion.tokens), "finish": answer.completion.finish,
            **({"helpfulness": rating.helpfulness, "safe": rating.safe, "refusal": rating.refusal} if rating else {}),
            **{f"reward_{axis}": round(scores[index], 5) for axis, scores in result.rewards.items()}})
    return rows


def _line(result: summary.Version) -> str:
    parts = [f"{sum(len(a.completion.tokens) for a in result.answers) / len(result.answers):.0f} tokens an answer"]
    if result.ratings:
        mean = sum(rating.helpfulness for rating in result.ratings) / len(result.ratings)
        parts.append(f"rated {mean:.3f}")
    parts += [f"reward {axis} {sum(scores) / len(scores):.3f}" for axis, scores in result.rewards.items()]
    if "user" in result.ghost:
        parts.append("obeys " + "/".join(f"{turn['rate']:.2f}" for turn in result.ghost["user"]))
    return ", ".join(parts)


def _say(line: str) -> None:
    if mesh.is_main():
        print(line, file=sys.stderr)


__all__ = ["Answer", "Config", "Judges", "run", "samples"]
