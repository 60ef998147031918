"""Answers in the form that a client wants.

A grammar may fail while an answer is drawn, in the thread that draws all of them. That must not end
the thread: the sample is ended, and its request alone gets the error.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from llama2.errors import UserError
from llama2.generate.grammar import json_grammar
from llama2.generate.sampling import Grammar, Sampling
from llama2.serve import errors
from llama2.serve.schema import JsonBySchema, JsonObject, SamplingRequest
from llama2.tokenizer.template import find_ends
from llama2.tokenizer.tokenizer import Tokenizer


class FailsafeGrammar:
    """A grammar that allows only the end once it has failed; `error` is then the reason."""

    def __init__(self, grammar: Grammar, tokenizer: Tokenizer) -> None:
        self.error: errors.ApiError | None = None
        self._grammar, self._tokenizer = grammar, tokenizer

    def fresh(self) -> FailsafeGrammar:
        """Return the grammar at the beginning of an answer."""
        return FailsafeGrammar(self._grammar.fresh(), self._tokenizer)

    def mask(self) -> Tensor:
        """Return the allowed tokens, bool [V]."""
        if self.error is None:
            try:
                return self._grammar.mask()
            except UserError as error:
                self.error = _api_error(error)

        mask_V = torch.zeros(self._tokenizer.vocab_size, dtype=torch.bool)
        mask_V[find_ends(self._tokenizer)[0]] = True
        return mask_V

    def accept(self, token: int) -> None:
        """Go on behind a token that was drawn."""
        if self.error is None:
            try:
                self._grammar.accept(token)
            except UserError as error:
                self.error = _api_error(error)


async def constrain(sampling: Sampling, request: SamplingRequest, tokenizer: Tokenizer) -> Sampling:
    """Return the sampling with the grammar of a request's `response_format`; ApiError for a schema
    that cannot be used."""
    form = request.response_format
    if isinstance(form, JsonBySchema):
        schema: dict[str, Any] | None = form.json_schema.schema_ or {}
    elif isinstance(form, JsonObject):
        schema = form.schema_ or None  # any object
    else:
        return sampling

    try:
        grammar = await asyncio.to_thread(json_grammar, tokenizer, schema)
    except UserError as error:
        raise _api_error(error) from None

    return replace(sampling, grammar=FailsafeGrammar(grammar, tokenizer))


def _api_error(error: UserError) -> errors.ApiError:
    return errors.invalid(f"response_format: {error}", "response_format")
