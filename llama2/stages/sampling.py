"""What stages that sample share: loading a policy into an engine, reading prompts, scoring what came back."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from pydantic import Field, field_validator

from llama2 import mesh, records
from llama2.config import Config
from llama2.errors import UserError
from llama2.generate.dialogue import Answer, Chat
from llama2.generate.engine import Engine
from llama2.generate.remote import Progress, Server, connect
from llama2.generate.rewards import RewardModels, Rewards, Score
from llama2.generate.sampling import Sampling
from llama2.mesh import Precision
from llama2.model.checkpoint import config_of
from llama2.records import Dialog, Message, Messages, Prompt
from llama2.runs import CHECKPOINTS, Run
from llama2.stages.training import fitting_tokenizer, frozen, load_policy, load_scorer
from llama2.tokenizer.template import encode_prompt
from llama2.tokenizer.tokenizer import Tokenizer


class Sample(Config):
    """How answers are sampled."""

    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    max_tokens: int = Field(1024, gt=0)
    slots: int = Field(64, gt=0)
    """answers generated side by side on a rank"""
    precision: Precision = "bf16"
    server: Server | None = None
    """sample on a server that serves the policy, instead of here; under several ranks each asks for its share"""

    @field_validator("precision", mode="before")
    @classmethod
    def _unrounded(cls, value: object) -> object:
        if value in ("int8", "int4"):
            raise ValueError("rounded weights are for chat, serve and evaluate; what is learnt from is sampled with "
                             "the policy's own, in fp32 or bf16")
        return value

    def sampling(self, seed: int) -> Sampling:
        """One answer a prompt, drawn this way."""
        return Sampling(temperature=self.temperature, top_p=self.top_p, max_tokens=self.max_tokens, seed=seed)


def load_chat(path: Path, sample: Sample, run: Run) -> Chat:
    """A checkpoint ready to answer: here, or on a server, whose answers are kept in `run` until it is finished."""
    if sample.server is not None:
        config = config_of(path)
        engine = connect(sample.server, fitting_tokenizer(path, config), config.max_position_embeddings,
                         state=run.path / CHECKPOINTS / "answers", progress=reporter(sample.server.url))
        return Chat(engine, engine.tokenizer)
    model, tokenizer = load_policy(path, torch.bfloat16 if sample.precision == "bf16" else torch.float32)
    model.eval().requires_grad_(False)
    return Chat(Engine(model, slots=sample.slots, precision=sample.precision), tokenizer)


def reporter(title: str, seconds: float = 10.0) -> Progress:
    """Says on stderr how many answers have come, every so many seconds (rank 0, of its own share)."""
    said = time.monotonic()

    def report(done: int, total: int) -> None:
        nonlocal said
        now = time.monotonic()
        if mesh.is_main() and now - said >= seconds:
            said = now
            print(f"{title}: {done:,} of {total:,} answers", file=sys.stderr, flush=True)

    return report


def load_rewards(settings: RewardModels, tokenizer: Tokenizer, precision: Precision = "bf16") -> Rewards:
    """Both reward models; their tokenizer must be the policy's."""
    helpful, safe = (frozen(load_scorer(path, tokenizer)[0], precision) if path else None
                     for path in (settings.helpful, settings.safe))
    assert helpful is not None
    return Rewards(settings, helpful, safe, precision)


def read_prompts(path: Path, limit: int | None, seed: int) -> list[Prompt]:
    """Prompts of a file; with a limit, a random choice that depends on the seed alone."""
    prompts = list(records.read(Prompt, path))
    if limit is None or limit >= len(prompts):
        return prompts
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed)).tolist()
    return [prompts[index] for index in sorted(order[:limit])]


def answer(chat: Chat, prompts: Sequence[Messages], sample: Sample, *, n: int = 1, seed: int = 0,
           temperature: float | None = None) -> list[list[Answer]]:
    """`n` answers to each prompt; under several ranks the work is shared and every rank gets all."""
    sampling = Sampling(temperature=sample.temperature if temperature is None else temperature, top_p=sample.top_p,
                        max_tokens=sample.max_tokens, n=n, stop=(chat.tokenizer.eos,), seed=seed)
    with torch.inference_mode():
        return chat.answers(prompts, sampling)


def score(rewards: Rewards, tokenizer: Tokenizer, prompts: Sequence[Prompt],
          answers: Sequence[Sequence[Answer]]) -> list[list[Score]]:
    """The reward of every answer to every prompt."""
    rows, tags = [], []
    for prompt, mine in zip(prompts, answers):
        ids = encode_prompt(tokenizer, prompt.messages)
        rows += [[*ids, *one.completion.tokens] for one in mine]
        tags += [prompt.safety] * len(mine)
    scores = iter(rewards(rows, tags))
    return [[next(scores) for _ in mine] for mine in answers]


def dialog(prompt: Prompt, text: str, **metadata: object) -> Dialog:
    """A prompt and its answer as something to learn from."""
    return Dialog((*prompt.messages, Message("assistant", text)), metadata={**prompt.metadata, **metadata})


def has_room(chat: Chat, messages: Messages, room: int = 8) -> bool:
    """Whether a conversation leaves `room` tokens of the model's context for an answer."""
    return len(encode_prompt(chat.tokenizer, messages)) + room <= chat.engine.context


def fitting(chat: Chat, prompts: Sequence[Prompt], room: int = 8) -> list[Prompt]:
    """The prompts that leave `room` tokens for an answer; UserError if there are prompts but none that does."""
    kept = [prompt for prompt in prompts if has_room(chat, prompt.messages, room)]
    if prompts and not kept:
        raise UserError(f"none of {len(prompts)} prompts leaves {room} tokens for an answer in the context of "
                        f"{chat.engine.context}", "give shorter prompts, or a model with a longer context")
    return kept


def write_records(path: Path, items: Sequence[object]) -> None:
    """Write JSON Lines from rank 0."""
    if mesh.is_main():
        records.write(path, items)
