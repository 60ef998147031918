"""What several versions say to the same prompts, and what reward models think of it (§3.4): for
`evaluate`, `select`.

One model is in memory at a time. First every version answers, one after another; then each reward
model judges all answers, one after another. So the most that a rank holds is the larger of a
version with its cache and a reward model, never their sum. A model is loaded when the first
unfinished part of its work asks for it and let go before the next; what is finished is on the disk
(`parts`), and is not done again after an interruption.
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
from llama2.generate.engine import Completion
from llama2.generate.sampling import Sampling
from llama2.generate.score import rewards
from llama2.hashing import hash_file
from llama2.model.scorer import Scorer
from llama2.records import Messages, Prompt
from llama2.runs import Run
from llama2.runs.parts import in_parts
from llama2.stages.common.training import freeze
from llama2.tally import Tally
from llama2.tokenizer.template import encode_prompt
from llama2.tokenizer.tokenizer import Tokenizer

ROUNDS = 8  # a part is as many answers as the slots give in so many rounds
JUDGED = 1024  # answers in a part of a reward model's work
JUDGED_TOKENS = 4096  # padded tokens that it reads in one forward pass

T = TypeVar("T")
Ready = Callable[[], T]


@contextmanager
def in_turn(load: Ready[T], device: torch.device) -> Iterator[Ready[T]]:
    """A function that gives what `load` makes, loaded at its first call; the memory is free again
    behind the block."""
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


# --- prompts and versions
# --------------------------------------------------------------------------------------------


def fitting(
    checkpoints: Sequence[Path], prompts: Sequence[Prompt], room: int, tally: Tally, source: Path
) -> list[Prompt]:
    """The prompts that ask something and leave every version `room` tokens for its answer; the
    others are counted in `tally`."""
    asking = [prompt for prompt in prompts if prompt.asks]
    kept = asking
    for path in checkpoints:
        tokenizer, context = (
            Tokenizer.load(path),
            checkpoint.config_of(path).max_position_embeddings,
        )
        kept = [
            prompt
            for prompt in kept
            if len(encode_prompt(tokenizer, prompt.messages)) + room <= context
        ]

    if not kept:
        raise UserError(
            f"{source}: no prompt is short enough for the context of all versions"
            if asking
            else f"{source}: it holds no prompt",
            "give shorter prompts" if asking else "give prompts",
        )

    tally.read, tally.kept = len(prompts), len(kept)
    tally.skip("empty turn", count=len(prompts) - len(asking))
    tally.skip(
        "too long for the context of a version", "give shorter prompts", len(asking) - len(kept)
    )

    return kept


def twins(checkpoints: Sequence[Path]) -> list[int]:
    """For each checkpoint the place of the first that is the same model: a rejected candidate's
    place is taken by its predecessor, and nobody need answer twice."""
    contents = [content(path) for path in checkpoints]
    return [contents.index(one) for one in contents]


def content(path: Path) -> object:
    """What tells two checkpoints apart: shape, tokenizer and weights; the place, where the weights
    are elsewhere."""
    known = hf_directory.read_checksums(path)
    try:
        weights = sorted(
            known.get(file.name) or hash_file(file) for file in hf_directory.list_weight_files(path)
        )
    except UserError:
        return path.resolve()

    return checkpoint.config_of(path), Tokenizer.load(path).fingerprint, tuple(weights)


# --- answers
# ---------------------------------------------------------------------------------------------------------


def answered(
    run: Run,
    name: str,
    chat: Ready[Chat],
    prompts: Sequence[Messages],
    sampling: Sampling,
    slots: int,
) -> list[Answer]:
    """One answer to each prompt, in parts under `name`. Log-probabilities are not kept."""

    def work(some: Sequence[Messages], first: int) -> list[Any]:
        with torch.inference_mode():
            rows = chat().answers(some, sampling, range(first, first + len(some)))

        return [[one.text, one.completion.finish, one.completion.tokens] for one, *_ in rows]

    return [
        Answer(text, Completion((), tuple(tokens), (), finish))
        for text, finish, tokens in in_parts(run, name, prompts, ROUNDS * slots, work)
    ]


# --- judges
# ----------------------------------------------------------------------------------------------------------


def check_judge(path: Path, versions: Sequence[Path] = ()) -> None:
    """UserError, before anything is sampled, unless `path` is a reward model with the tokenizer of
    the `versions`."""
    if not checkpoint.is_scorer(path):
        raise UserError(
            f"{path}: not a reward model (it has no scalar head)",
            "give the output directory of a `reward` run",
        )

    own = Tokenizer.load(path)
    if not all(Tokenizer.load(version).is_same(own) for version in versions):
        raise UserError(
            f"{path}: its tokenizer is not the policy's",
            "train policy and reward models on one tokenizer",
        )


def judged(
    run: Run,
    name: str,
    path: Path,
    precision: Precision,
    prompts: Sequence[Prompt],
    said: Mapping[int, Sequence[Answer]],
    versions: Sequence[Path],
) -> dict[int, list[float]]:
    """The raw scores that the reward model at `path` gives to what each version said, in parts
    under `name`. Of a conversation longer than its context the end is read.

    What two versions say alike is read once: the rounding of two batches must not make one of them
    the better.
    """
    tokenizer, context = Tokenizer.load(path), checkpoint.config_of(path).max_position_embeddings
    found = {}
    scores: dict[tuple[int, str, str], float] = {}

    device = run.ranks.device
    with in_turn(lambda: load_judge(path, precision, device), device) as judge:
        for version, answers in said.items():
            same = Tokenizer.load(versions[version]).is_same(tokenizer)
            keys = [(index, one.text, one.completion.finish) for index, one in enumerate(answers)]
            fresh = [key for key in keys if key not in scores]

            def work(
                some: Sequence[tuple[int, str, str]],
                first: int,
                answers: Sequence[Answer] = answers,
                same: bool = same,
            ) -> list[float]:
                rows = [
                    encode_judged(tokenizer, prompts[index], answers[index], same)[-context:]
                    for index, *_ in some
                ]
                return rewards(judge(), rows, precision, JUDGED_TOKENS, ranks=run.ranks, name=path)

            scores.update(zip(fresh, in_parts(run, f"{name}-{version}", fresh, JUDGED, work)))
            found[version] = [scores[key] for key in keys]

    return found


def load_judge(path: Path, precision: Precision, device: torch.device) -> Scorer:
    """A reward model that is only read (`training.freeze`). Each weight is converted as it comes
    from the disk: all of them in fp32 would take twice the room that the model takes afterwards."""

    def kind(name: str) -> torch.dtype:
        return (
            torch.bfloat16
            if precision == "bf16" and name.endswith("_proj.weight")
            else torch.float32
        )

    return freeze(checkpoint.load_scorer(path, dtype=kind, device=device), precision)
