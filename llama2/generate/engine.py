"""The one engine: token ids in, completions with their log-probabilities out (§3.2.3, §3.4.1, §4.2,
A.2.1).

Rollouts, rejection sampling, evaluation and chat differ only in who calls. Sequences of any lengths
are decoded side by side in slots of a KV cache; a finished one gives its slot to the next prompt,
and the samples of one prompt share its prefill. The engine runs the model's own code on its current
weights, so log-probabilities are the trainer's: in fp32 within 1e-5 of a full forward pass. In bf16
they differ from the trainer's by about as much as the trainer's own bf16 differs from fp32: 0.01
nats on average and 0.06 at most for logits with a deviation of 1.

Weights are rounded to bf16 once a call, not by autocast at each product: 1.5 to 2.2 times as fast,
equally accurate.

Shapes: T tokens of a prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from llama2 import kernels
from llama2.errors import UserError
from llama2.generate import cpu_decoder
from llama2.generate.batch import Batch, Request
from llama2.generate.cpu_decoder import CpuDecoder
from llama2.generate.sampling import Sampling
from llama2.generate.session import Session
from llama2.model import quantize
from llama2.model.cache import KVCache
from llama2.model.linear import is_hooked
from llama2.model.llama import Llama
from llama2.model.quantize import QuantizedWeight, WeightPrecision
from llama2.model.replica import empty_copy, structure

Tokens = Sequence[int]
Progress = Callable[[int, int], None]  # completions finished, and of how many
BEGIN, TEST_TOKENS = 1, 4  # what an engine that tests itself begins with, and how far it goes
_ROUND = 64  # capacities are multiples of this, so that calls of similar length share one cache


@dataclass(frozen=True)
class Completion:
    """One sample. `tokens` ends with the stop id if `finish` is "stop"; `logprobs` are those of
    `tokens` under the model itself, before temperature, top-k and top-p."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish: Literal["stop", "length"]

    def ended_by(self, eos: int) -> tuple[int, ...]:
        """`tokens`, of which `eos` is the end if any stop id was: so ends every answer that is
        learnt from."""
        return (*self.tokens[:-1], eos) if self.finish == "stop" else self.tokens

    @classmethod
    def of(cls, request: Request) -> Completion:
        """What a finished request came to."""
        return cls(
            request.prompt,
            tuple(request.tokens),
            tuple(request.logprobs),
            "stop" if request.finish == "stop" else "length",
        )


class Generator(Protocol):
    """Whatever completes prompts. `context` is the most tokens of prompt and completion
    together."""

    context: int

    def generate(
        self, prompts: Sequence[Tokens], sampling: Sampling, indices: Sequence[int] | None = None
    ) -> list[list[Completion]]: ...

    def check(self, prompts: Sequence[Tokens]) -> None: ...

    def stream(self, prompt: Tokens, sampling: Sampling) -> Iterator[int]: ...


class Engine:
    """Samples from `model` as its weights are at each call.

    slots: sequences decoded side by side. capacity: the most tokens of a sequence, prompt included
    (default: the context of the model). precision: "bf16" computes with weights rounded once a
    call, "fp32" with the model's own, "int8" and "int4" in bf16 with matrices rounded to integers
    (see `model/quantize.py`), which on a CPU a decoding step also reads as such. A copy of the
    weights is held only where the model's cannot be used as they are: another type, rounded, or
    sharded. UserError for "int4" without torchao.
    """

    def __init__(
        self,
        model: Llama,
        *,
        slots: int = 64,
        capacity: int | None = None,
        precision: WeightPrecision = "bf16",
    ) -> None:
        quantize.check(precision)
        context = model.config.max_position_embeddings
        self.slots, self.context = slots, min(capacity or context, context)
        self.progress: Progress | None = None
        self._model = kernels.install(model)
        self._dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        self._bits = precision if precision == "int8" or precision == "int4" else None
        self._copy: Llama | None = None
        self._rounded: dict[
            str, QuantizedWeight
        ] = {}  # matrices of the copy, until they are packed
        self._spare: KVCache | None = None
        self._decoder: CpuDecoder | None = None
        self._state: list[tuple[int, int]] = []  # of the weights that are packed
        self._structure = structure(model)

    def generate(
        self, prompts: Sequence[Tokens], sampling: Sampling, indices: Sequence[int] | None = None
    ) -> list[list[Completion]]:
        """`sampling.n` completions of each prompt, in the order of the prompts.

        A completion depends on its prompt, `sampling` and its index alone: `indices` (default 0, 1,
        ...) names the prompts to the random numbers, so that a share of a list gets the samples
        that the whole list would get. UserError for a prompt that leaves no room for an answer; a
        sample that reaches the context ends by "length".
        """
        self.check(prompts)
        names = range(len(prompts)) if indices is None else indices
        requests = [
            Request(
                tuple(prompt),
                _own(sampling),
                name,
                sample,
                min(sampling.max_tokens, self.context - len(prompt)),
            )
            for prompt, name in zip(prompts, names, strict=True)
            for sample in range(sampling.n)
        ]
        model = self.current()

        if not requests:
            return []

        batch = self._batch(model, requests)
        while batch.step():
            if self.progress:
                self.progress(len(requests) - batch.left, len(requests))

        self._spare = batch.cache
        done = [Completion.of(request) for request in requests]
        return [done[start : start + sampling.n] for start in range(0, len(done), sampling.n)]

    def stream(self, prompt: Tokens, sampling: Sampling) -> Iterator[int]:
        """The tokens of `generate([prompt], sampling)[0][0]`, each as it is drawn."""
        self.check([prompt])
        request = Request(
            tuple(prompt),
            _own(sampling),
            limit=min(sampling.max_tokens, self.context - len(prompt)),
        )
        batch = self._batch(self.current(), [request])

        for _ in range(request.limit):
            batch.step()
            token = batch.newest()
            yield token

            if token in sampling.stop:
                break

        self._spare = batch.cache

    def test(self, place: object = "the model") -> None:
        """One short greedy answer. UserError if its log-probabilities are not finite, as where
        weights are damaged."""
        question = Sampling(temperature=0, max_tokens=TEST_TOKENS)
        try:
            self.generate([[BEGIN]], question)
        except UserError as error:
            raise UserError(f"{place}: {error.cause}", error.cure) from None

    def open(self, kept: int | None = None) -> Session:
        """A batch that stays open, for the weights of this moment. Its cache holds `slots` running
        rows and `kept` ones (as many unless given), each of the engine's whole context."""
        model = self.current()
        return Session(
            model,
            self._cache(model, self.slots + (self.slots if kept is None else kept), self.context),
            self.slots,
            self._packed(model),
        )

    def check(self, prompts: Sequence[Tokens]) -> None:
        """Raise the UserError that `generate` would raise for these prompts."""
        for index, prompt in enumerate(prompts):
            name = f"prompt {index + 1} of {len(prompts)}" if len(prompts) > 1 else "the prompt"
            excess = len(prompt) + 1 - self.context
            if excess > 0:
                raise UserError(
                    f"{name} has {len(prompt)} tokens, {excess} more than leave room for an answer in the "
                    f"context of {self.context}",
                    "shorten it",
                )
            if not prompt:
                raise UserError(f"{name} is empty", "begin it with the BOS token")
            if not 0 <= min(prompt) <= max(prompt) < self._model.config.vocab_size:
                raise UserError(
                    f"{name} has token ids outside of the model's {self._model.config.vocab_size}",
                    "use the tokenizer that belongs to the checkpoint",
                )

    def _batch(self, model: Llama, requests: list[Request]) -> Batch:
        longest = max(len(request.prompt) + request.limit for request in requests)
        slots = min(self.slots, len(requests))
        spare, self._spare = self._spare, None  # taken, so that a stream left open keeps its own

        if spare is None or spare.slots < slots or spare.capacity < longest:
            if spare is not None:
                slots, longest = max(slots, spare.slots), max(longest, spare.capacity)
                del spare

            spare = self._cache(model, slots, -(-longest // _ROUND) * _ROUND)

        return Batch(
            model, spare, min(self.slots, len(requests)), requests, decoder=self._packed(model)
        )

    def _packed(self, model: Llama) -> CpuDecoder | None:
        """The weights as our own decoding step reads them, where it runs."""
        if self._decoder is None and cpu_decoder.supports(model):
            self._decoder = CpuDecoder(model, self._rounded)
            self._rounded = {}

        return self._decoder

    def _cache(self, model: Llama, slots: int, capacity: int) -> KVCache:
        c = model.config
        return KVCache(
            c.num_hidden_layers,
            slots,
            c.num_key_value_heads,
            capacity,
            c.head_dim,
            dtype=self._dtype,
            device=model.device,
        )

    def current(self) -> Llama:
        """The model that this engine serves: with its weights of this moment, in the engine's
        precision.

        Weights that may be trained are taken anew at every call: a fused optimizer leaves no trace
        of what it writes. Frozen ones are taken once, as long as nothing else writes to them and
        no module is replaced, wrapped or hooked.
        """
        modules, weights = structure(self._model), list(self._model.parameters())
        sharded = any(_is_sharded(weight) for weight in weights)
        frozen = not sharded and not any(weight.requires_grad for weight in weights)
        read = (*weights, *self._model.buffers())
        state = [(tensor.data_ptr(), _version(tensor)) for tensor in read] if frozen else []
        restructured = modules != self._structure
        changed = not frozen or restructured or state != self._state

        if changed:
            self._state, self._structure, self._decoder = state, modules, None

        if (
            not sharded
            and self._bits is None
            and all(weight.dtype == self._dtype for weight in weights)
        ):
            return self._model

        if self._copy is None or restructured:
            self._copy, changed = _blank(self._model, self._dtype), True

        if changed:
            with torch.inference_mode():
                for (name, own), weight in zip(self._copy.named_parameters(), weights, strict=True):
                    own.copy_(_whole(weight))
                    self._round(name, own)

                for held, buffer in zip(self._copy.buffers(), self._model.buffers(), strict=True):
                    held.copy_(buffer)

            if not cpu_decoder.supports(self._copy):
                self._rounded = {}

        return self._copy

    def _round(self, name: str, own: Tensor) -> None:
        """Put into a parameter of the copy what its integers stand for, if it is one that is
        rounded."""
        tied = self._model.config.tie_word_embeddings
        if self._bits is None or quantize.reason_to_keep(name, own, self._bits, tied=tied):
            return

        found = quantize.quantize(own, self._bits)
        own.copy_(found.dequantize())
        self._rounded[name] = found


def _is_sharded(weight: Tensor) -> bool:
    """Told by its method: the class of sharded tensors takes half a second to import."""
    return hasattr(weight, "full_tensor")


def _whole(weight: Tensor) -> Tensor:
    if not _is_sharded(weight):
        return weight

    # in inference mode PyTorch 2.11 cannot gather
    with torch.inference_mode(False), torch.no_grad():
        gathered: Tensor = weight.full_tensor()  # type: ignore[attr-defined]

    return gathered


def _version(weight: Tensor) -> int:
    """Counts what was written to a tensor; one made for inference cannot be trained."""
    return 0 if weight.is_inference() else weight._version


def _own(sampling: Sampling) -> Sampling:
    """The sampling of one sample: a grammar goes through states, so each has its own."""
    return (
        sampling
        if sampling.grammar is None
        else replace(sampling, grammar=sampling.grammar.fresh())
    )


def _blank(model: Llama, dtype: torch.dtype) -> Llama:
    """Memory for a model of the same shape, unsharded and of type `dtype`."""
    if not any(_is_sharded(weight) for weight in model.parameters()):
        return empty_copy(model, dtype)

    leaves = [module for module in model.modules() if not any(module.children())]
    if any(is_hooked(module) for module in leaves):
        raise UserError(
            "a model spread over ranks is sampled from a copy, which would lack the hooks of its "
            "modules",
            "remove them, or train with --training.parallel replicate",
        )

    with torch.device("meta"):
        blank = Llama(model.config)

    return kernels.install(blank).to(dtype).to_empty(device=model.device)


__all__ = ["Completion", "Engine", "Generator", "Progress", "Sampling", "Tokens"]
