"""The models of a server: checkpoints from disk, each with its tokenizer and the thread that owns
it.

A checkpoint that cannot do what is asked of it is refused before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import ClassVar, Literal, TypeVar

import torch

from llama2 import devices
from llama2.devices import Precision
from llama2.errors import UserError, did_you_mean
from llama2.formats import checkpoint
from llama2.generate.engine import Engine
from llama2.generate.score import score_rows
from llama2.model import quantize
from llama2.model.scorer import Scorer
from llama2.records import Messages
from llama2.serve import errors
from llama2.serve.detokenizer import Alternatives
from llama2.serve.settings import ServeConfig
from llama2.serve.worker import Worker
from llama2.tokenizer.template import check_template, encode_answered, find_ends
from llama2.tokenizer.tokenizer import Tokenizer

Kind = Literal["chat", "reward"]
M = TypeVar("M", "ChatModel", "RewardModel")
_POSITIONS = 512  # of a prompt whose logits are held at once


@dataclass(frozen=True)
class ServedModel:
    """A model with its tokenizer and the thread that owns it."""

    name: str
    created: int
    """seconds since 1970"""
    tokenizer: Tokenizer
    worker: Worker

    @cached_property
    def longest_token(self) -> int:
        """Return the most characters that a token may stand for."""
        texts = map(self.tokenizer.bytes_of, range(self.tokenizer.vocab_size))
        return max(len(text.decode(errors="replace")) for text in texts)


@dataclass(frozen=True)
class ChatModel(ServedModel):
    """A language model. `worker` alone may touch the model of `engine`."""

    kind: ClassVar[Kind] = "chat"
    purpose: ClassVar[str] = "it answers: use /v1/chat/completions or /v1/completions"

    engine: Engine
    precision: Precision
    """of computation"""

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """Return the ids that end an answer."""
        return find_ends(self.tokenizer)

    @property
    def context(self) -> int:
        """Return the most tokens of prompt and answer together."""
        return self.engine.context

    async def prompt_logprobs(
        self, ids: Sequence[int], count: int
    ) -> list[tuple[float, Alternatives]]:
        """Return log p of each token of `ids` but the first, and the `count` likeliest in its
        place."""
        work = partial(_prompt_logprobs, self.engine, ids, count, self.precision)
        return await self.worker.call(work)


@dataclass(frozen=True)
class RewardModel(ServedModel):
    """A reward model. `worker` alone may touch `scorer`."""

    kind: ClassVar[Kind] = "reward"
    purpose: ClassVar[str] = "it is a reward model: use /v1/score"

    scorer: Scorer
    precision: Precision

    @property
    def context(self) -> int:
        """Return the most tokens of a conversation."""
        return self.scorer.config.max_position_embeddings

    def encode(self, messages: Messages) -> list[int]:
        """Return the ids of a finished conversation."""
        return encode_answered(self.tokenizer, messages)

    async def score(self, ids: Sequence[int]) -> float:
        """Return the raw score of one conversation."""
        work = partial(score_rows, self.scorer, [ids], precision=self.precision)
        return (await self.worker.call(work))[0]


class Models(dict[str, ChatModel | RewardModel]):
    """All models of a server by name."""

    def get_model(self, name: str) -> ChatModel | RewardModel:
        """Return the model of that name; ApiError 404 if there is none."""
        if name not in self:
            raise errors.ApiError(
                404,
                f"there is no model '{name[:100]}'; {did_you_mean(name[:100], self)}",
                param="model",
                code="model_not_found",
            )

        return self[name]

    def find(self, kind: type[M], name: str | None) -> M:
        """Return the model of a kind that is named, or the first; ApiError if there is none."""
        if name:  # some clients send none as ""
            model = self.get_model(name)
            if isinstance(model, kind):
                return model

            raise errors.invalid(f"the model '{name}' cannot do that; {model.purpose}", "model")

        for model in self.values():
            if isinstance(model, kind):
                return model

        raise errors.ApiError(
            404, "no model of this server does that", param="model", code="model_not_found"
        )


def load(config: ServeConfig) -> Models:
    """Load checkpoints and start their workers, each with its self-test. UserError for what cannot
    be served."""
    quantize.check(config.precision)
    paths, names = config.checkpoints, config.model_names
    kinds = [check(path) for path in paths]
    if kinds[0] == "reward" and "chat" in kinds:
        raise UserError(
            f"{paths[0]}: the first model is the default, and a reward model does not answer",
            "put a language model first",
        )

    loaders: dict[Kind, Callable[..., ChatModel | RewardModel]] = {
        "chat": load_chat,
        "reward": load_reward,
    }
    models = zip(paths, names, kinds)
    return Models({name: loaders[kind](path, name, config) for path, name, kind in models})


def check(path: Path) -> Kind:
    """Return the kind of a model; UserError if its tokenizer or chat template is missing or
    another's."""
    scorer = checkpoint.is_scorer(path)
    tokenizer = checkpoint.load_tokenizer(path)

    if scorer:
        return "reward"

    check_template(path, tokenizer)
    return "chat"


def load_chat(path: Path, name: str, config: ServeConfig) -> ChatModel:
    """Load a language model and start its worker."""
    dtype = quantize.load_dtype(config.precision)
    model = checkpoint.load(path, dtype=dtype, device=devices.choose()).eval().requires_grad_(False)
    engine = Engine(model, slots=config.slots, capacity=config.capacity, precision=config.precision)
    worker = Worker(name, engine, config.limits.waiting)
    worker.start()

    precision = quantize.compute_precision(config.precision)
    return ChatModel(
        name, _created(path), checkpoint.open_tokenizer(path), worker, engine, precision
    )


def load_reward(path: Path, name: str, config: ServeConfig) -> RewardModel:
    """Load a reward model and start its worker."""
    if not checkpoint.is_scorer(path):
        raise UserError(
            f"{path}: this is a language model, a reward model was expected",
            "give the directory of a model from 'llama2 reward'",
        )

    scorer = checkpoint.load_scorer(path, device=devices.choose()).eval().requires_grad_(False)
    worker = Worker(name, None, config.limits.waiting)
    worker.start()

    precision = quantize.compute_precision(config.precision)
    return RewardModel(
        name, _created(path), checkpoint.open_tokenizer(path), worker, scorer, precision
    )


def load_judge(path: Path, config: ServeConfig, models: Models) -> RewardModel:
    """Load the reward model that judges the answers of `models`; UserError if it cannot read the
    longest of them."""
    check(path)
    judge = load_reward(path, path.resolve().name, config)
    contexts = [model.context for model in models.values() if model.kind == "chat"]
    longest = max(contexts, default=0)

    if judge.context < longest:
        raise UserError(
            f"{path}: it reads {judge.context} tokens, and answers may have {longest}",
            f"set --capacity {judge.context}",
        )

    return judge


def _created(path: Path) -> int:
    return int((path if path.is_file() else path / checkpoint.CONFIG).stat().st_mtime)


@torch.inference_mode()
def _prompt_logprobs(
    engine: Engine, ids: Sequence[int], count: int, precision: Precision
) -> list[tuple[float, Alternatives]]:
    """Return log p of T tokens but the first, P positions at a time, each with the likeliest K of
    V."""
    if len(ids) < 2:
        return []

    model = engine.refresh()
    device = model.device
    tokens_T = torch.tensor(ids, device=device)
    logprobs: list[tuple[float, Alternatives]] = []

    with devices.autocast(device, precision):
        hidden_TD = model(tokens_T[None, :-1], head=False)[0]
        for begin in range(0, len(ids) - 1, _POSITIONS):
            logp_PV = model.logits(hidden_TD[begin : begin + _POSITIONS]).float().log_softmax(-1)
            targets_P = tokens_T[begin + 1 :][: len(logp_PV)]
            logp_P = logp_PV.gather(1, targets_P[:, None])[:, 0].tolist()
            top = logp_PV.topk(min(count, logp_PV.shape[1]), -1)

            top_PK = zip(top.indices.tolist(), top.values.tolist())
            logprobs += [(logp, tuple(zip(*top_K))) for logp, top_K in zip(logp_P, top_PK)]

    return logprobs
