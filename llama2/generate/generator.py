"""What all engines have in common: prompts in, completions with their log-probabilities out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from llama2.errors import UserError
from llama2.generate.sampling import Sampling
from llama2.model.llama import Llama

Tokens = Sequence[int]
Progress = Callable[[int, int], None]  # completions finished, and of how many


@dataclass(frozen=True)
class Completion:
    """One sample of a prompt.

    `tokens` ends with the stop id if `finish` is "stop"; `logprobs` are those of `tokens` under the
    model itself, before temperature, top-k and top-p.
    """

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish: Literal["stop", "length"]

    def end_with(self, eos: int) -> tuple[int, ...]:
        """Return `tokens` with `eos` in the place of the stop id, if there is one: so ends every
        answer that is learnt from."""
        return (*self.tokens[:-1], eos) if self.finish == "stop" else self.tokens


class Generator(Protocol):
    """Completes prompts. `context` is the most tokens of prompt and completion together."""

    context: int

    def generate(
        self, prompts: Sequence[Tokens], sampling: Sampling, indices: Sequence[int] | None = None
    ) -> list[list[Completion]]:
        """Return `sampling.n` completions of each prompt, in the order of the prompts.

        A completion depends on its prompt, `sampling` and its index alone: `indices` (default 0, 1,
        ...) names the prompts to the random numbers, so that a share of a list gets the samples
        that the whole list would get. UserError for a prompt that `check` refuses.
        """

    def stream(self, prompt: Tokens, sampling: Sampling) -> Iterator[int]:
        """Yield the tokens of one completion, each as it is drawn."""

    def check(self, prompts: Sequence[Tokens]) -> None:
        """Raise the UserError that `generate` would raise for these prompts."""

    def update(self, weights: Llama) -> None:
        """Sample with the present weights of this model from the next call on. UserError from an
        engine that cannot take weights."""


def check_prompts(prompts: Sequence[Tokens], context: int, vocab_size: int) -> None:
    """UserError for a prompt that is empty, leaves no room for an answer, or has unknown ids."""
    for index, prompt in enumerate(prompts):
        name = f"prompt {index + 1} of {len(prompts)}" if len(prompts) > 1 else "the prompt"
        excess = len(prompt) + 1 - context
        if excess > 0:
            raise UserError(
                f"{name} has {len(prompt)} tokens, {excess} more than leave room for an answer "
                f"in the context of {context}",
                "shorten it",
            )

        if not prompt:
            raise UserError(f"{name} is empty", "begin it with the BOS token")

        if not 0 <= min(prompt) <= max(prompt) < vocab_size:
            raise UserError(
                f"{name} has token ids outside of the model's {vocab_size}",
                "use the tokenizer that belongs to the checkpoint",
            )
