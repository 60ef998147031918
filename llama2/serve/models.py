"""The models of a server: checkpoints from disk, each with its tokenizer and the thread that owns
it.

A checkpoint that cannot do what is asked of it is refused before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal

import torch

from llama2 import devices
from llama2.devices import Precision
from llama2.errors import UserError, did_you_mean
from llama2.formats import checkpoint
from llama2.generate.engine import Engine
from llama2.generate.score import rewards
from llama2.model import quantize
from llama2.model.llama import Llama
from llama2.model.quantize import WeightPrecision
from llama2.model.scorer import Scorer
from llama2.records import Messages
from llama2.serve import errors
from llama2.serve.worker import Alternatives, Worker
from llama2.tokenizer.template import check_template, encode_dialog
from llama2.tokenizer.tokenizer import Tokenizer

Kind = Literal["chat", "reward"]
_POSITIONS = 512  # of a prompt whose logits are held at once
_PURPOSE = {
    "chat": "it answers: use /v1/chat/completions or /v1/completions",
    "reward": "it is a reward model: use /v1/score",
}


@dataclass(frozen=True)
class ChatModel:
    """A language model. `worker` alone may touch `model`."""

    name: str
    created: int
    tokenizer: Tokenizer
    model: Llama
    engine: Engine
    worker: Worker
    precision: WeightPrecision

    kind: Kind = "chat"

    @property
    def longest(self) -> int:
        """The most characters that a token may stand for."""
        return _longest(self.tokenizer)

    @property
    def context(self) -> int:
        """The most tokens of prompt and answer together."""
        return self.engine.context

    async def prompt_logprobs(
        self, ids: Sequence[int], count: int
    ) -> list[tuple[float, Alternatives]]:
        """log p of each token of `ids` but the first, and the `count` likeliest in its place."""
        return await self.worker.call(
            partial(
                _prompt_logprobs,
                self.engine,
                ids,
                count,
                quantize.compute_precision(self.precision),
            )
        )


@dataclass(frozen=True)
class RewardModel:
    """A reward model. `worker` alone may touch `scorer`."""

    name: str
    created: int
    tokenizer: Tokenizer
    scorer: Scorer
    worker: Worker
    precision: Precision

    kind: Kind = "reward"

    @property
    def longest(self) -> int:
        """The most characters that a token may stand for."""
        return _longest(self.tokenizer)

    @property
    def context(self) -> int:
        """The most tokens of a conversation."""
        return self.scorer.config.max_position_embeddings

    def encode(self, messages: Messages) -> list[int]:
        """The ids it reads of a finished conversation."""
        return encode_dialog(self.tokenizer, messages)[0]

    async def score(self, ids: Sequence[int]) -> float:
        """The raw score of one conversation."""
        found = await self.worker.call(
            partial(rewards, self.scorer, [ids], precision=self.precision)
        )
        return found[0]


class Models:
    """All models of a server by name."""

    def __init__(self, models: Sequence[ChatModel | RewardModel]) -> None:
        self._models = {model.name: model for model in models}

    def __iter__(self) -> Iterator[ChatModel | RewardModel]:
        return iter(self._models.values())

    def named(self, name: str) -> ChatModel | RewardModel:
        """ApiError 404 if there is none of that name."""
        if name not in self._models:
            raise errors.ApiError(
                404,
                f"there is no model '{name[:100]}'; {did_you_mean(name[:100], self._models)}",
                param="model",
                code="model_not_found",
            )

        return self._models[name]

    def chat(self, name: str | None) -> ChatModel:
        """A model that answers: the one named, or the first."""
        found = self._of_kind("chat", name)
        assert isinstance(found, ChatModel)
        return found

    def reward(self, name: str | None) -> RewardModel:
        """A model that scores: the one named, or the first."""
        found = self._of_kind("reward", name)
        assert isinstance(found, RewardModel)
        return found

    def _of_kind(self, kind: Kind, name: str | None) -> ChatModel | RewardModel:
        if not name:  # some clients send none as ""
            model = next((model for model in self._models.values() if model.kind == kind), None)
            if model is None:
                raise errors.ApiError(
                    404, "no model of this server does that", param="model", code="model_not_found"
                )

            return model

        model = self.named(name)
        if model.kind != kind:
            raise errors.invalid(
                f"the model '{name}' cannot do that; {_PURPOSE[model.kind]}", "model"
            )

        return model


def load(
    paths: Sequence[Path],
    names: Sequence[str],
    *,
    slots: int,
    capacity: int | None,
    waiting: int,
    precision: WeightPrecision,
) -> Models:
    """Load checkpoints and start their workers, each with its self-test. UserError for what cannot
    be served."""
    quantize.check(precision)
    kinds = [check(path) for path in paths]
    if twice := next((name for name in names if list(names).count(name) > 1), None):
        raise UserError(f"two models are called '{twice}'", "name them: --names A B")
    if kinds[0] == "reward" and "chat" in kinds:
        raise UserError(
            f"{paths[0]}: the first model is the default, and a reward model does not answer",
            "put a language model first",
        )

    return Models(
        [
            load_chat(
                path, name, slots=slots, capacity=capacity, waiting=waiting, precision=precision
            )
            if kind == "chat"
            else load_reward(
                path, name, waiting=waiting, precision=quantize.compute_precision(precision)
            )
            for path, name, kind in zip(paths, names, kinds)
        ]
    )


def check(path: Path) -> Kind:
    """What kind of model lies there; UserError if its tokenizer or chat template is missing or
    another's."""
    scorer = checkpoint.is_scorer(path)
    tokenizer = checkpoint.load_tokenizer(path)

    if scorer:
        return "reward"

    check_template(path, tokenizer.template)
    return "chat"


def load_chat(
    path: Path,
    name: str,
    *,
    slots: int,
    capacity: int | None,
    waiting: int,
    precision: WeightPrecision,
) -> ChatModel:
    """A language model with its worker running."""
    dtype = quantize.load_dtype(precision)
    model = checkpoint.load(path, dtype=dtype, device=devices.choose()).eval()
    model.requires_grad_(False)
    engine = Engine(model, slots=slots, capacity=capacity, precision=precision)
    worker = Worker(name, engine, waiting)
    worker.start()

    return ChatModel(name, _created(path), Tokenizer.load(path), model, engine, worker, precision)


def load_reward(path: Path, name: str, *, waiting: int, precision: Precision) -> RewardModel:
    """A reward model with its worker running."""
    if not checkpoint.is_scorer(path):
        raise UserError(
            f"{path}: this is a language model, a reward model was expected",
            "give the directory of a model from 'llama2 reward'",
        )

    scorer = checkpoint.load_scorer(path, device=devices.choose()).eval()
    scorer.requires_grad_(False)
    worker = Worker(name, None, waiting)
    worker.start()

    return RewardModel(name, _created(path), Tokenizer.load(path), scorer, worker, precision)


def load_judge(path: Path, models: Models, waiting: int, precision: WeightPrecision) -> RewardModel:
    """The reward model that judges the answers of `models`; it must be able to read the longest of
    them."""
    check(path)
    judge = load_reward(
        path, path.resolve().name, waiting=waiting, precision=quantize.compute_precision(precision)
    )
    longest = max((model.context for model in models if model.kind == "chat"), default=0)

    if judge.context < longest:
        raise UserError(
            f"{path}: it reads {judge.context} tokens, and answers may have {longest}",
            f"set --capacity {judge.context}",
        )

    return judge


@lru_cache
def _longest(tokenizer: Tokenizer) -> int:
    return max(
        len(tokenizer.bytes_of(token).decode(errors="replace"))
        for token in range(tokenizer.vocab_size)
    )


def _created(path: Path) -> int:
    return int((path / checkpoint.CONFIG).stat().st_mtime)


@torch.inference_mode()
def _prompt_logprobs(
    engine: Engine, ids: Sequence[int], count: int, precision: Precision
) -> list[tuple[float, Alternatives]]:
    model = engine.current()
    device = model.device
    tokens_T = torch.tensor(ids, device=device)
    found: list[tuple[float, Alternatives]] = []

    with devices.autocast(device, precision):
        hidden_TD = (
            model(tokens_T[None, :-1], head=False)[0]
            if len(ids) > 1
            else torch.empty(0, device=device)
        )
        for begin in range(0, len(ids) - 1, _POSITIONS):
            logp_PV = model.logits(hidden_TD[begin : begin + _POSITIONS]).float().log_softmax(-1)
            own_P1 = logp_PV.gather(1, tokens_T[begin + 1 :][: len(logp_PV), None])
            top = logp_PV.topk(min(count, logp_PV.shape[1]), -1)

            for own, ids_K, values_K in zip(
                own_P1[:, 0].tolist(), top.indices.tolist(), top.values.tolist()
            ):
                found.append((own, tuple(zip(ids_K, values_K))))

    return found
