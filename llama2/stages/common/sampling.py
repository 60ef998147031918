"""What stages that sample share: loading a policy into an engine, reading prompts, scoring what
came back."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from pydantic import Field, field_validator

from llama2 import records
from llama2.config import Config
from llama2.devices import Precision
from llama2.errors import UserError
from llama2.formats.checkpoint import config_of, load_tokenizer
from llama2.generate.dialogue import Answer, Chat
from llama2.generate.engine import Engine, Progress
from llama2.generate.remote import RemoteEngine, Server, connect
from llama2.generate.rewards import RewardModels, Rewards, Score
from llama2.generate.sampling import Sampling
from llama2.hashing import hash_number
from llama2.ranks import Ranks
from llama2.records import Dialog, Message, Messages, Prompt
from llama2.runs import CHECKPOINTS, Run
from llama2.runs.parts import Work, in_parts
from llama2.stages.common.answers import check_judge
from llama2.stages.common.training import freeze, load_policy, load_scorer
from llama2.tally import Tally
from llama2.terminal_text import clock, say
from llama2.tokenizer.template import check_template, encode_prompt
from llama2.tokenizer.tokenizer import Tokenizer

T = TypeVar("T")
ANSWERS = f"{CHECKPOINTS}/answers"  # of a server


class Sample(Config):
    """How answers are sampled."""

    incidental: ClassVar[frozenset[str]] = frozenset({"part"})

    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    max_tokens: int = Field(1024, gt=0)
    slots: int = Field(64, gt=0)
    """answers generated side by side on a rank"""
    precision: Precision = "bf16"
    part: int = Field(64, gt=0)
    """answers of each slot after which what is done is on disk, and is not sampled again after an
    interruption"""
    server: Server | None = None
    """sample on a server that serves the policy, instead of here; under several ranks each asks for
    its share"""

    @field_validator("precision", mode="before")
    @classmethod
    def _unrounded(cls, value: object) -> object:
        if value in ("int8", "int4"):
            raise ValueError(
                "rounded weights are for chat, serve and evaluate; what is learnt from is sampled with "
                "the policy's own, in fp32 or bf16"
            )

        return value

    def sampling(self, seed: int) -> Sampling:
        """One answer a prompt, drawn this way."""
        return Sampling(
            temperature=self.temperature, top_p=self.top_p, max_tokens=self.max_tokens, seed=seed
        )


def load_chat(path: Path, sample: Sample, run: Run) -> Chat:
    """A checkpoint ready to answer: here, or on a server, whose answers are kept in `run` until it
    is finished."""
    if sample.server is not None:
        config = config_of(path)
        tokenizer = load_tokenizer(path, config)
        check_template(path, tokenizer.template)
        remote = connect(
            sample.server,
            tokenizer,
            config.max_position_embeddings,
            state=run.path / ANSWERS,
            rank=run.ranks.rank,
            progress=reporter(sample.server.url, run.ranks),
        )

        return Chat(remote, tokenizer, run.ranks)

    kind = torch.bfloat16 if sample.precision == "bf16" else torch.float32
    model, tokenizer = load_policy(path, run.ranks.device, kind)
    check_template(path, tokenizer.template)
    engine = Engine(
        model.eval().requires_grad_(False), slots=sample.slots, precision=sample.precision
    )
    engine.test(path)

    return Chat(engine, tokenizer, run.ranks)


class Meter:
    """Says on stderr, every so many seconds, how many answers there are and how long the others
    will take (rank 0)."""

    def __init__(self, title: str, ranks: Ranks, total: int = 0, seconds: float = 10.0) -> None:
        """`total`: answers of all calls together; 0: each call speaks for itself."""
        self.title, self.ranks, self.total, self.seconds = title, ranks, total, seconds
        self._begin = self._said = time.monotonic()
        self._found: int | None = None  # what was there when the first call began
        # answers before this call; of this rank's share, there and in all
        self._before = self._seen = self._size = 0

    def begin(self, before: int) -> None:
        """The next call begins, and so many answers are there."""
        self._before, self._seen, self._size = before, 0, 0
        if self._found is None:
            self._found, self._begin = before, time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        if done < self._seen:  # another call has begun
            self._before += self._size * self.ranks.data.size

        self._seen, self._size = done, total
        now = time.monotonic()
        if self.ranks.is_main and now - self._said >= self.seconds:
            self._said = now
            say(self.line(now - self._begin))

    def line(self, elapsed: float) -> str:
        """`title: 1,024 of 28,000 answers, 3:20 left`."""
        if not self.total:
            return f"{self.title}: {self._seen:,} of {self._size:,} answers"

        done = min(self._before + self._seen * self.ranks.data.size, self.total)
        fresh = done - (self._found or 0)
        left = elapsed / fresh * (self.total - done) if fresh > 0 else 0.0
        ending = f", {clock(left)} left" if fresh > 0 else ""

        return f"{self.title}: {done:,} of {self.total:,} answers{ending}"


def reporter(title: str, ranks: Ranks, seconds: float = 10.0) -> Progress:
    """Says on stderr how many answers have come, every so many seconds (rank 0, of its own
    share)."""
    return Meter(title, ranks, seconds=seconds)


def part_by_part(
    run: Run,
    chats: Sequence[Chat],
    name: str,
    items: Sequence[T],
    work: Work[T],
    sample: Sample,
    answers: int = 1,
) -> Iterator[Any]:
    """`parts.in_parts` for work that samples: the rows of each item, in order; finished parts are
    not sampled again.

    `answers`: how many are sampled for an item. At the end of a part slots stand empty: where
    answers have m tokens on average and at most M, it takes sample.part * m decoding steps and up
    to M - m more. With the demo's lengths (17, and 53) parts of 64 take 2.5 % more steps than one
    part would, parts of 32 take 4.9 %.
    """
    size = max(1, sample.part * sample.slots * run.ranks.data.size // max(answers, 1))
    meter = Meter(str(run.path), run.ranks, answers * len(items))

    def sampled(some: Sequence[T], first: int) -> Sequence[Any]:
        meter.begin(first * answers)
        for chat in chats:
            if isinstance(chat.engine, (Engine, RemoteEngine)):
                chat.engine.progress = meter

            if isinstance(chat.engine, RemoteEngine):
                chat.engine.keep_in(_journal(run, f"{name}-{first}"))

        return work(some, first)

    return in_parts(run, name, items, size, sampled)


def _journal(run: Run, part: str) -> Path:
    """Where a server's answers for one part are kept until the part is finished; those before it
    are."""
    mine = run.path / ANSWERS / part
    if run.ranks.is_main and mine.parent.is_dir():
        for other in mine.parent.iterdir():
            if other != mine:
                shutil.rmtree(other, ignore_errors=True)

    return mine


def load_rewards(
    settings: RewardModels, tokenizer: Tokenizer, ranks: Ranks, precision: Precision = "bf16"
) -> Rewards:
    """Both reward models; their tokenizer must be the policy's. UserError for a language model,
    whose fresh head would judge by chance."""
    for path in settings.paths():
        check_judge(path)

    helpful, safe = (
        freeze(load_scorer(path, ranks.device, tokenizer)[0], precision) if path else None
        for path in (settings.helpful, settings.safe)
    )
    assert helpful is not None
    return Rewards(settings, helpful, safe, precision, ranks)


def read_prompts(path: Path, limit: int | None, seed: int) -> list[Prompt]:
    """Prompts of a file; with a limit, a random choice that depends on the seed alone."""
    prompts = list(records.read(Prompt, path))
    if limit is None or limit >= len(prompts):
        return prompts

    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed)).tolist()
    return [prompts[index] for index in sorted(order[:limit])]


def seed_for(seed: int, *use: object) -> int:
    """The seed of one use of randomness inside a stage: no two uses, rounds or turns share their
    random numbers."""
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
    """`n` answers to each prompt; under several ranks the work is shared and every rank gets all.

    `indices` are the places of the prompts in a longer list of which they are a part.
    """
    sampling = Sampling(
        temperature=sample.temperature if temperature is None else temperature,
        top_p=sample.top_p,
        max_tokens=sample.max_tokens,
        n=n,
        stop=chat.tokenizer.stops,
        seed=seed,
    )
    with torch.inference_mode():
        return chat.answers(prompts, sampling, indices)


def score(
    rewards: Rewards,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    answers: Sequence[Sequence[Answer]],
) -> list[list[Score]]:
    """The reward of every answer to every prompt.

    One rule holds for the search of a temperature, the choice of answers, judges and PPO: an answer
    that was cut off is scored as it is, without an EOS that was never sampled.
    """
    rows, tags = [], []
    for prompt, mine in zip(prompts, answers):
        ids = encode_prompt(tokenizer, prompt.messages)
        rows += [[*ids, *one.completion.ended_by(tokenizer.eos)] for one in mine]
        tags += [prompt.safety] * len(mine)

    scores = iter(rewards(rows, tags))
    return [[next(scores) for _ in mine] for mine in answers]


def dialog(prompt: Prompt, text: str, **metadata: object) -> Dialog:
    """A prompt and its answer as something to learn from: the answer alone, not the turns that
    stood in the prompt."""
    # of another answer, if of any
    asked = {key: value for key, value in prompt.metadata.items() if key != "cut"}
    return Dialog((*prompt.messages, Message("assistant", text)), "last", {**asked, **metadata})


def has_room(chat: Chat, messages: Messages, room: int = 8) -> bool:
    """Whether a conversation leaves `room` tokens of the model's context for an answer."""
    return len(encode_prompt(chat.tokenizer, messages)) + room <= chat.engine.context


def fitting(
    chat: Chat,
    prompts: Sequence[Prompt],
    room: int = 8,
    tally: Tally | None = None,
    cure: str = "shorten them, or take a model with a longer context",
) -> list[Prompt]:
    """The prompts that ask something and leave `room` tokens for an answer; UserError if there are
    prompts but none that does.

    `tally` counts them, and those left out. `cure`: what would leave room.
    """
    asking = [prompt for prompt in prompts if prompt.asks]
    if prompts and not asking:
        raise UserError(
            f"none of {len(prompts)} prompts asks anything: each has an empty turn",
            "mend the prompts",
        )

    kept = [prompt for prompt in asking if has_room(chat, prompt.messages, room)]
    if prompts and not kept:
        raise UserError(
            f"none of {len(prompts)} prompts leaves {room} tokens for an answer in the context of "
            f"{chat.engine.context}",
            cure,
        )

    if tally is not None:
        tally.read, tally.kept = tally.read + len(prompts), tally.kept + len(kept)
        tally.skip("empty turn", count=len(prompts) - len(asking))
        tally.skip("longer than the context leaves room for", cure, len(asking) - len(kept))

    return kept


def readable(
    chat: Chat, rewards: Rewards, prompts: Sequence[Prompt], sample: Sample, tally: Tally
) -> list[Prompt]:
    """The prompts whose answers cannot outgrow the reward models, which may read less than the
    policy; UserError if there are prompts but none such. `tally` has counted them as kept, and
    counts those left out."""

    def longest(prompt: Prompt) -> int:
        return min(
            len(encode_prompt(chat.tokenizer, prompt.messages)) + sample.max_tokens,
            chat.engine.context,
        )

    cure = "lower sample.max_tokens, or name reward models with a longer context"
    kept = [prompt for prompt in prompts if longest(prompt) <= rewards.context]
    if prompts and not kept:
        raise UserError(
            f"the reward models read {rewards.context} tokens: less than each of {len(prompts)} prompts "
            f"with an answer of {sample.max_tokens} may have",
            cure,
        )

    tally.kept -= len(prompts) - len(kept)
    tally.skip("longer with an answer than the reward models read", cure, len(prompts) - len(kept))
    return kept


@contextmanager
def writing(path: Path, ranks: Ranks) -> Iterator[Callable[[object], None]]:
    """A function that writes one more record, on rank 0; the file is there when the block ends."""
    if ranks.is_main:
        with records.writing(path) as put:
            yield put
    else:
        yield lambda record: None
