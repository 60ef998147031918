"""One sample that is to be drawn, and what has been drawn of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

from llama2.generate.sampling import Sampling

Prompt = tuple[int, ...]
Finish = Literal["stop", "length", "cancelled"]


@dataclass(eq=False)
class SampleRequest:
    """A sample of a prompt; `index` is the prompt's, `sample` its own."""

    prompt: Prompt
    sampling: Sampling
    index: int = 0
    sample: int = 0
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    """of `tokens`, under the model itself"""
    alternatives: list[tuple[tuple[int, float], ...]] = field(default_factory=list)
    """the likeliest tokens and their log-probabilities at each position, if
    `sampling.top_logprobs` asks for them"""
    finish: Finish | None = None
    """"stop": the last token is a stop id; None while it runs"""
    cached: int = 0
    """tokens of the prompt that were read before, with another request"""

    @cached_property
    def draw_key(self) -> Sampling:
        """The settings that two requests must have in common to be drawn together."""
        return replace(self.sampling, n=1, max_tokens=1, seed=0)

    @property
    def stream(self) -> tuple[int, int, int]:
        """The name of its random numbers."""
        return self.sampling.seed, self.index, self.sample

    @property
    def read_tokens(self) -> Prompt:
        """The tokens whose keys and values are in the cache: all but the newest."""
        return (*self.prompt, *self.tokens[:-1])

    def max_new_tokens(self, context: int) -> int:
        """Return the most tokens to draw, where prompt and answer share `context` tokens."""
        return min(self.sampling.max_tokens, context - len(self.prompt))


def make_requests(
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    samples: int,
    indices: Sequence[int] | None = None,
) -> list[SampleRequest]:
    """Return `samples` requests for each prompt, in the order of the prompts.

    `indices` (default 0, 1, ...) name the prompts to the random numbers. A grammar remembers what
    was drawn, so each request has one of its own.
    """
    names = range(len(prompts)) if indices is None else indices
    return [
        SampleRequest(tuple(prompt), sampling.restart(), name, sample)
        for prompt, name in zip(prompts, names, strict=True)
        for sample in range(samples)
    ]
