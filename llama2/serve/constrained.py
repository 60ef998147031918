"""The form that a client wants for its answers.

A grammar may refuse to go on while an answer is drawn, in the thread that draws all of them. That
must not end the thread: its sample is ended, and that one request is told why.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace

import torch
from torch import Tensor

from llama2.errors import UserError
from llama2.generate.grammar import json_grammar
from llama2.generate.sampling import Grammar, Sampling
from llama2.serve import errors
from llama2.serve.schema import JsonBySchema, JsonObject, Sampled
from llama2.tokenizer.tokenizer import Tokenizer


class Shape:
    """A grammar that has only an end left once it has failed; `error` then says why."""

    def __init__(self, grammar: Grammar, tokenizer: Tokenizer) -> None:
        self.error: errors.ApiError | None = None
        self._grammar, self._tokenizer = grammar, tokenizer

    def fresh(self) -> Shape:
        return Shape(self._grammar.fresh(), self._tokenizer)

    def mask(self) -> Tensor:
        if self.error is None:
            try:
                return self._grammar.mask()
            except UserError as error:
                self.error = _refused(error)

        mask_V = torch.zeros(self._tokenizer.vocab_size, dtype=torch.bool)
        mask_V[self._tokenizer.eos] = True
        return mask_V

    def accept(self, token: int) -> None:
        if self.error is None:
            try:
                self._grammar.accept(token)
            except UserError as error:
                self.error = _refused(error)


async def shaped(sampling: Sampling, asked: Sampled, tokenizer: Tokenizer) -> Sampling:
    """The sampling with the grammar of what the answer shall be; ApiError for a schema that cannot
    be used."""
    form = asked.response_format
    if not isinstance(form, JsonObject | JsonBySchema):
        return sampling

    schema = (
        form.json_schema.schema_ or {} if isinstance(form, JsonBySchema) else form.schema_ or None
    )
    try:
        grammar = await asyncio.to_thread(json_grammar, tokenizer, schema)
    except UserError as error:
        raise _refused(error) from None

    return replace(sampling, grammar=Shape(grammar, tokenizer))


def _refused(error: UserError) -> errors.ApiError:
    return errors.invalid(f"response_format: {error}", "response_format")
