"""Answers of several versions to the same prompts, and their scores (§3.4): for `evaluate` and
`select`.

One model is in memory at a time. First every version answers, one after another; then each reward
model judges all answers, one after another. So a rank never holds more than a version with its
cache, or a reward model. A model is loaded when the first unfinished part of its work asks for it,
and freed before the next; finished parts are on disk (`parts`), and are not done again after an
interruption.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

from llama2 import devices
from llama2.devices import Precision
from llama2.errors import UserError
from llama2.evaluate.judges import encode_judged
from llama2.formats import checkpoint, hf_directory
from llama2.generate.dialogue import Answer, Chat
from llama2.generate.generator import Completion
from llama2.generate.sampling import Sampling
from llama2.generate.score import score_rows
from llama2.hashing import hash_file
from llama2.model.scorer import Scorer
from llama2.records import Messages, Prompt
from llama2.runs import Run
from llama2.runs.parts import work_in_parts
from llama2.stages.common.training import freeze
from llama2.tally import Tally
from llama2.tokenizer.template import encode_prompt, has_same_format

ROUNDS = 8  # a part has as many answers as the slots give in so many rounds
JUDGED = 1024  # answers in a part of a reward model's work
JUDGED_TOKENS = 4096  # padded tokens that it reads in one forward pass

T = TypeVar("T")
Ready = Callable[[], T]
_Key = tuple[int, str, str]  # prompt, answer and finish


@contextmanager
def load_when_needed(load: Ready[T], device: torch.device) -> Iterator[Ready[T]]:
    """Give a function that returns the result of `load`, called once, when it is first needed; the
    memory of `device` is free again after the block."""
    held: list[T] = []

    def ready() -> T:
        if not held:
            held.append(load())

        return held[0]

    try:
        yield ready
    finally:
        held.clear()
        devices.free_memory(device)


# --- prompts and versions ---


def keep_prompts(
    prompts: Sequence[Prompt],
    fits: Callable[[Prompt], bool],
    tally: Tally,
    reason: str,
    error: UserError,
    cure: str = "",
) -> list[Prompt]:
    """Return the prompts that fit; `error` if there are prompts but none fits.

    `tally` has counted them as kept, and counts those left out for `reason`; `cure` says what would
    keep them.
    """
    fitting = [prompt for prompt in prompts if fits(prompt)]
    if prompts and not fitting:
        raise error

    tally.kept -= len(prompts) - len(fitting)
    tally.skip(reason, cure, len(prompts) - len(fitting))
    return fitting


def keep_fitting(
    checkpoints: Sequence[Path], prompts: Sequence[Prompt], room: int, tally: Tally, source: Path
) -> list[Prompt]:
    """Return the prompts that ask something and leave every version `room` tokens for its answer;
    the others are counted in `tally`."""
    tally.read = tally.kept = len(prompts)
    empty = UserError(f"{source}: it holds no prompt", "give prompts")
    asking = keep_prompts(prompts, lambda prompt: prompt.asks, tally, "empty turn", empty)
    if not asking:
        raise empty

    limits = [
        (checkpoint.open_tokenizer(path), checkpoint.config_of(path).max_position_embeddings)
        for path in checkpoints
    ]

    def fits(prompt: Prompt) -> bool:
        return all(
            len(encode_prompt(tokenizer, prompt.messages)) + room <= context
            for tokenizer, context in limits
        )

    cure = "give shorter prompts"
    error = UserError(f"{source}: no prompt is short enough for the context of all versions", cure)
    return keep_prompts(asking, fits, tally, "too long for the context of a version", error, cure)


def find_equals(checkpoints: Sequence[Path]) -> list[int]:
    """Return for each checkpoint the index of the first that is the same model: a rejected
    candidate is replaced by its predecessor, and none need answer twice."""
    identities = [identify(path) for path in checkpoints]
    return [identities.index(identity) for identity in identities]


def identify(path: Path) -> object:
    """Return what tells two checkpoints apart: shape, tokenizer and weights; the path, where the
    weights are elsewhere."""
    known = hf_directory.read_checksums(path)
    try:
        files = [path] if path.is_file() else hf_directory.list_weight_files(path)
        weights = sorted(known.get(file.name) or hash_file(file) for file in files)
    except UserError:
        return path.resolve()

    return checkpoint.config_of(path), checkpoint.open_tokenizer(path).fingerprint, tuple(weights)


# --- answers ---


def answer_prompts(
    run: Run,
    name: str,
    chat: Ready[Chat],
    prompts: Sequence[Messages],
    sampling: Sampling,
    slots: int,
) -> list[Answer]:
    """Return one answer to each prompt, in parts under `name`. Log-probabilities are not kept."""

    def work(part: Sequence[Messages], first: int) -> list[Any]:
        with torch.inference_mode():
            rows = chat().answer(part, sampling, range(first, first + len(part)))

        return [
            [answer.text, answer.completion.finish, answer.completion.tokens] for answer, *_ in rows
        ]

    rows = work_in_parts(run, name, prompts, ROUNDS * slots, work)
    return [
        Answer(text, Completion((), tuple(tokens), (), finish)) for text, finish, tokens in rows
    ]


# --- judges ---


def check_judge(path: Path, versions: Sequence[Path] = ()) -> None:
    """UserError, before anything is sampled, unless `path` is a reward model with the tokenizer of
    the `versions`."""
    if not checkpoint.is_scorer(path):
        raise UserError(
            f"{path}: not a reward model (it has no scalar head)",
            "give the output directory of a `reward` run",
        )

    tokenizer = checkpoint.open_tokenizer(path)
    if not all(checkpoint.open_tokenizer(version).is_same(tokenizer) for version in versions):
        raise UserError(
            f"{path}: its tokenizer is not the policy's",
            "train policy and reward models on one tokenizer",
        )


def judge_answers(
    run: Run,
    name: str,
    path: Path,
    precision: Precision,
    prompts: Sequence[Prompt],
    answers: Mapping[int, Sequence[Answer]],
    versions: Sequence[Path],
) -> dict[int, list[float]]:
    """Return the raw scores that the reward model at `path` gives to the answers of each version,
    in parts under `name`. If a conversation is longer than its context, it reads the end.

    An answer that two versions give alike is read once: the rounding of two batches must not make
    one of them the better.
    """
    tokenizer, context = (
        checkpoint.open_tokenizer(path),
        checkpoint.config_of(path).max_position_embeddings,
    )
    scores: dict[_Key, float] = {}
    result = {}

    device = run.ranks.device
    with load_when_needed(lambda: load_judge(path, precision, device), device) as judge:
        for version, given in answers.items():
            sampler = checkpoint.open_tokenizer(versions[version])
            same = sampler.is_same(tokenizer) and has_same_format(sampler, tokenizer)
            keyed: dict[_Key, Answer] = {
                (index, answer.text, answer.completion.finish): answer
                for index, answer in enumerate(given)
            }

            def work(
                part: Sequence[_Key],
                first: int,
                keyed: Mapping[_Key, Answer] = keyed,
                same: bool = same,
            ) -> list[float]:
                rows = [encode_judged(tokenizer, prompts[key[0]], keyed[key], same) for key in part]
                rows = [row[-context:] for row in rows]
                return score_rows(
                    judge(), rows, precision, JUDGED_TOKENS, ranks=run.ranks, name=path
                )

            fresh = [key for key in keyed if key not in scores]
            scores.update(zip(fresh, work_in_parts(run, f"{name}-{version}", fresh, JUDGED, work)))
            result[version] = [scores[key] for key in keyed]

    return result


def load_judge(path: Path, precision: Precision, device: torch.device) -> Scorer:
    """Return a reward model that is only read (`training.freeze`). Each weight is converted as it
    comes from the disk: all of them in fp32 would take twice the room that the model takes
    afterwards."""

    def choose_dtype(name: str) -> torch.dtype:
        halved = precision == "bf16" and name.endswith("_proj.weight")
        return torch.bfloat16 if halved else torch.float32

    scorer = checkpoint.load_scorer(path, dtype=choose_dtype, device=device)
    return freeze(scorer, precision)
