"""Parts of all stages that sample: a policy in an engine, prompts, answers and their scores."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from pydantic import Field, field_validator

from llama2 import records
from llama2.config import Config as Section
from llama2.devices import Precision
from llama2.errors import UserError
from llama2.formats.checkpoint import config_of, load_tokenizer
from llama2.generate.dialogue import Answer, Chat
from llama2.generate.engine import Engine
from llama2.generate.remote import RemoteEngine, Server, connect
from llama2.generate.rewards import RewardModels, Rewards, Score
from llama2.generate.sampling import Sampling
from llama2.hashing import hash_number
from llama2.ranks import Ranks
from llama2.records import Dialog, Message, Messages, Prompt
from llama2.runs import CHECKPOINTS, Run
from llama2.runs.parts import Work, work_in_parts
from llama2.stages.common.answers import check_judge, keep_prompts
from llama2.stages.common.meter import Meter
from llama2.stages.common.training import freeze, load_policy, load_scorer
from llama2.tally import Tally
from llama2.tokenizer.template import check_template, encode_prompt, find_ends
from llama2.tokenizer.tokenizer import Tokenizer

T = TypeVar("T")
ANSWERS = f"{CHECKPOINTS}/answers"  # of a server


class Sample(Section):
    """The way answers are sampled."""

    incidental: ClassVar[frozenset[str]] = frozenset({"part"})

    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    max_tokens: int = Field(1024, gt=0)
    slots: int = Field(64, gt=0)
    """answers generated side by side on a rank"""
    precision: Precision = "bf16"
    part: int = Field(64, gt=0)
    """answers of each slot after which finished ones are on disk, and are not sampled again after
    an interruption"""
    server: Server | None = None
    """sample on a server that serves the policy, instead of here; under several ranks each asks for
    its share"""

    @field_validator("precision", mode="before")
    @classmethod
    def _refuse_rounded(cls, value: object) -> object:
        if value in ("int8", "int4"):
            raise ValueError(
                "rounded weights are for chat, serve and evaluate; answers to learn from are "
                "sampled with the policy's own weights, in fp32 or bf16"
            )

        return value

    def make_sampling(self, seed: int) -> Sampling:
        """Return the sampling of one answer a prompt."""
        return Sampling(
            temperature=self.temperature, top_p=self.top_p, max_tokens=self.max_tokens, seed=seed
        )


def load_chat(path: Path, sample: Sample, run: Run) -> Chat:
    """Return a checkpoint ready to answer: here, or on a server, whose answers are kept in `run`
    until it is finished."""
    if sample.server is not None:
        config = config_of(path)
        tokenizer = load_tokenizer(path, config)
        check_template(path, tokenizer)
        remote = connect(
            sample.server,
            tokenizer,
            config.max_position_embeddings,
            state=run.path / ANSWERS,
            rank=run.ranks.rank,
            progress=Meter(sample.server.url, run.ranks),
        )
        return Chat(remote, tokenizer, run.ranks)

    dtype = torch.bfloat16 if sample.precision == "bf16" else torch.float32
    model, tokenizer = load_policy(path, run.ranks.device, dtype)
    check_template(path, tokenizer)
    engine = Engine(
        model.eval().requires_grad_(False), slots=sample.slots, precision=sample.precision
    )
    engine.test(path)

    return Chat(engine, tokenizer, run.ranks)


def sample_in_parts(
    run: Run,
    chats: Sequence[Chat],
    name: str,
    items: Sequence[T],
    work: Work[T],
    sample: Sample,
    answers: int = 1,
) -> Iterator[Any]:
    """Yield the rows of each item, in order, as `parts.in_parts` does, for work that samples;
    finished parts are not sampled again.

    `answers`: how many are sampled for an item. At the end of a part slots are empty: where
    answers have m tokens on average and at most M, it takes sample.part * m decoding steps and up
    to M - m more. With the demo's lengths (17, and 53) parts of 64 take 2.5 % more steps than one
    part would, parts of 32 take 4.9 %.
    """
    size = max(1, sample.part * sample.slots * run.ranks.data.size // max(answers, 1))
    meter = Meter(str(run.path), run.ranks, answers * len(items))

    def work_on_part(part: Sequence[T], first: int) -> Sequence[Any]:
        meter.begin(first * answers)
        for chat in chats:
            if isinstance(chat.engine, (Engine, RemoteEngine)):
                chat.engine.progress = meter

            if isinstance(chat.engine, RemoteEngine):
                chat.engine.keep_in(_start_journal(run, f"{name}-{first}"))

        return work(part, first)

    return work_in_parts(run, name, items, size, work_on_part)


def _start_journal(run: Run, part: str) -> Path:
    """Return the directory for a server's answers to one part, and remove those of the parts
    before it, which are finished."""
    directory = run.path / ANSWERS / part
    if run.ranks.is_main and directory.parent.is_dir():
        for other in directory.parent.iterdir():
            if other != directory:
                shutil.rmtree(other, ignore_errors=True)

    return directory


def load_rewards(
    settings: RewardModels, tokenizer: Tokenizer, ranks: Ranks, precision: Precision = "bf16"
) -> Rewards:
    """Return both reward models; their tokenizer must be the policy's. UserError for a language
    model, whose fresh head would judge by chance."""
    for path in settings.paths():
        check_judge(path)

    helpful, safe = (
        freeze(load_scorer(path, ranks.device, tokenizer)[0], precision) if path else None
        for path in (settings.helpful, settings.safe)
    )
    assert helpful is not None
    return Rewards(settings, helpful, safe, precision, ranks)


def read_prompts(path: Path, limit: int | None, seed: int) -> list[Prompt]:
    """Return the prompts of a file; with a limit, a random choice that depends only on the seed."""
    prompts = list(records.read(Prompt, path))
    if limit is None or limit >= len(prompts):
        return prompts

    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed)).tolist()
    return [prompts[index] for index in sorted(order[:limit])]


def seed_use(seed: int, *use: object) -> int:
    """Return the seed of one use of randomness inside a stage: no two uses, rounds or turns share
    their random numbers."""
    return hash_number(repr((seed, *use))) >> 1


def answer(
    chat: Chat,
    prompts: Sequence[Messages],
    sample: Sample,
    *,
    n: int = 1,
    seed: int = 0,
    temperature: float | None = None,
    indices: Sequence[int] | None = None,
) -> list[list[Answer]]:
    """Return `n` answers to each prompt; under several ranks the work is shared and every rank gets
    all.

    `indices`: the positions of the prompts in a longer list of which they are a part.
    """
    sampling = replace(sample.make_sampling(seed), n=n)
    if temperature is not None:
        sampling = replace(sampling, temperature=temperature)

    with torch.inference_mode():
        return chat.answer(prompts, sampling, indices)


def score(
    rewards: Rewards,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    answers: Sequence[Sequence[Answer]],
) -> list[list[Score]]:
    """Return the score of every answer to every prompt.

    The same rule holds for the search of a temperature, the choice of answers, judges and PPO: an
    answer that was cut off is scored as it is, without an end that was never sampled.
    """
    rows, tags = [], []
    end = find_ends(tokenizer)[0]
    for prompt, group in zip(prompts, answers):
        ids = encode_prompt(tokenizer, prompt.messages)
        rows += [[*ids, *answer.completion.end_with(end)] for answer in group]
        tags += [prompt.safety] * len(group)

    scores = iter(rewards(rows, tags))
    return [list(islice(scores, len(group))) for group in answers]


def make_dialog(prompt: Prompt, text: str, **metadata: object) -> Dialog:
    """Return a prompt and its answer to learn from: only the answer, not the turns of the
    prompt."""
    inherited = dict(prompt.metadata)
    inherited.pop("cut", None)  # it speaks of another answer
    messages = (*prompt.messages, Message("assistant", text))
    return Dialog(messages, "last", {**inherited, **metadata})


def keep_fitting(
    chat: Chat,
    prompts: Sequence[Prompt],
    room: int = 8,
    tally: Tally | None = None,
    cure: str = "shorten them, or take a model with a longer context",
) -> list[Prompt]:
    """Return the prompts that ask something and leave `room` tokens for an answer. UserError if
    there are prompts but none that does.

    `tally` counts them, and those left out. `cure`: how to make room.
    """
    tally = Tally() if tally is None else tally
    tally.read += len(prompts)
    tally.kept += len(prompts)
    asking = keep_prompts(
        prompts,
        lambda prompt: prompt.asks,
        tally,
        "empty turn",
        UserError(
            f"none of {len(prompts)} prompts asks anything: each has an empty turn",
            "correct the prompts",
        ),
    )
    return keep_prompts(
        asking,
        lambda prompt: chat.has_room(prompt.messages, room),
        tally,
        "longer than the context leaves room for",
        UserError(
            f"none of {len(prompts)} prompts leaves {room} tokens for an answer in the context of "
            f"{chat.engine.context}",
            cure,
        ),
        cure,
    )


def keep_scorable(
    chat: Chat, rewards: Rewards, prompts: Sequence[Prompt], sample: Sample, tally: Tally
) -> list[Prompt]:
    """Return the prompts whose answers cannot outgrow the reward models, which may read less than
    the policy. UserError if there are prompts but none such.

    `tally` has counted them as kept, and counts those left out.
    """
    cure = "lower sample.max_tokens, or name reward models with a longer context"

    def fits(prompt: Prompt) -> bool:
        longest = len(encode_prompt(chat.tokenizer, prompt.messages)) + sample.max_tokens
        return min(longest, chat.engine.context) <= rewards.context

    return keep_prompts(
        prompts,
        fits,
        tally,
        "longer with an answer than the reward models read",
        UserError(
            f"the reward models read {rewards.context} tokens: less than each of {len(prompts)} "
            f"prompts with an answer of {sample.max_tokens} may have",
            cure,
        ),
        cure,
    )


@contextmanager
def open_records(path: Path, ranks: Ranks) -> Iterator[Callable[[object], None]]:
    """Give a function that writes one more record, on rank 0; the file is there when the block
    ends."""
    if ranks.is_main:
        with records.open_writer(path) as put:
            yield put
    else:
        yield lambda record: None
