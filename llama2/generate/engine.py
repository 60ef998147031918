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
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from llama2.errors import UserError
from llama2.generate.generator import Completion, Progress, Tokens, check_prompts
from llama2.generate.graphed_decoder import GraphedDecoder, find_decoder
from llama2.generate.model_runner import ModelRunner
from llama2.generate.offline_batch import OfflineBatch
from llama2.generate.prefix_cache import PrefixCache
from llama2.generate.request import SampleRequest, make_requests
from llama2.generate.sampling import Sampling
from llama2.generate.session import Session
from llama2.generate.slots import Slots
from llama2.generate.snapshot import Snapshot
from llama2.model.cache import KVCache
from llama2.model.llama import Llama
from llama2.model.quantize import WeightPrecision

BEGIN, TEST_TOKENS = 1, 4  # what an engine that tests itself begins with, and how far it goes
_ROUND = 64  # capacities are multiples of this, so that calls of similar length share one cache


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
        context = model.config.max_position_embeddings
        self.slots, self.context = slots, min(capacity or context, context)
        self.progress: Progress | None = None
        self._snapshot = Snapshot(model, precision)
        # of an earlier call, with the steps that were recorded over it
        self._spare: tuple[KVCache, GraphedDecoder | None] | None = None

    def generate(
        self, prompts: Sequence[Tokens], sampling: Sampling, indices: Sequence[int] | None = None
    ) -> list[list[Completion]]:
        """Return `sampling.n` completions of each prompt, as `Generator.generate`. A sample that
        reaches the context ends by "length"."""
        self.check(prompts)
        self.refresh()  # of sharded weights even without a prompt: the other ranks gather too
        requests = make_requests(prompts, sampling, sampling.n, indices)
        if not requests:
            return []

        slots = self._make_slots(requests)
        batch = OfflineBatch(slots, requests)
        while batch.step():
            if self.progress:
                self.progress(len(requests) - batch.unfinished, len(requests))

        self._spare = slots.runner.cache, slots.runner.graphs
        done = [_complete(request) for request in requests]
        return [done[start : start + sampling.n] for start in range(0, len(done), sampling.n)]

    def stream(self, prompt: Tokens, sampling: Sampling) -> Iterator[int]:
        """Yield the tokens of `generate([prompt], sampling)[0][0]`, each as it is drawn."""
        self.check([prompt])
        self.refresh()
        (request,) = make_requests([prompt], sampling, 1)
        slots = self._make_slots([request])
        batch = OfflineBatch(slots, [request])

        for _ in range(request.max_new_tokens(self.context)):
            batch.step()
            token = slots.newest_token()
            yield token

            if token in sampling.stop:
                break

        self._spare = slots.runner.cache, slots.runner.graphs

    def open(self, kept: int | None = None) -> Session:
        """Return a session with the weights of this moment. Its cache holds `slots` running rows
        and `kept` ones (as many unless given), each of the engine's whole context."""
        self.refresh()
        rows = self.slots + (self.slots if kept is None else kept)
        runner = self._make_runner(self._make_cache(rows, self.context), self.slots)
        slots = Slots(runner, self.slots, self.context, self.context)

        return Session(slots, PrefixCache(runner, range(self.slots, rows)))

    def check(self, prompts: Sequence[Tokens]) -> None:
        """Raise the UserError that `generate` would raise for these prompts."""
        check_prompts(prompts, self.context, self._snapshot.source.config.vocab_size)

    def test(self, name: object = "the model") -> None:
        """Draw one short greedy answer. UserError that begins with `name` if its log-probabilities
        are not finite, as where weights are damaged."""
        try:
            self.generate([[BEGIN]], Sampling(temperature=0, max_tokens=TEST_TOKENS))
        except UserError as error:
            raise UserError(f"{name}: {error.cause}", error.cure) from None

    def update(self, weights: Llama) -> None:
        """Sample with the weights of this model, of the same shape, from the next call on; they are
        read anew at each call while they may be trained."""
        self._snapshot.replace_source(weights)

    def refresh(self) -> Llama:
        """Return the model that samples, with its weights of this moment in the engine's
        precision."""
        if self._snapshot.is_stale():
            self._snapshot.refresh()

        return self._snapshot.model

    def _make_slots(self, requests: Sequence[SampleRequest]) -> Slots:
        """Return slots for some requests, on the cache of an earlier call if that is large
        enough."""
        new = [request.max_new_tokens(self.context) for request in requests]
        longest = max(len(request.prompt) + limit for request, limit in zip(requests, new))
        count = min(self.slots, len(requests))
        # taken, so that a stream left open keeps its own
        (cache, graphs), self._spare = self._spare or (None, None), None

        if cache is None or cache.slots < count or cache.capacity < longest:
            rows, capacity = count, -(-longest // _ROUND) * _ROUND
            if cache is not None:
                rows, capacity = max(rows, cache.slots), max(capacity, cache.capacity)
                del cache, graphs

            cache, graphs = self._make_cache(rows, capacity), None

        return Slots(self._make_runner(cache, cache.slots, graphs), count, self.context, max(new))

    def _make_runner(
        self, cache: KVCache, rows: int, graphs: GraphedDecoder | None = None
    ) -> ModelRunner:
        model = self._snapshot.model
        graphs = find_decoder(model, cache, rows, graphs)
        return ModelRunner(model, cache, self._snapshot.decoder, graphs)

    def _make_cache(self, rows: int, capacity: int) -> KVCache:
        model = self._snapshot.model
        return KVCache(
            model.config.num_hidden_layers,
            rows,
            model.config.num_key_value_heads,
            capacity,
            model.config.head_dim,
            dtype=self._snapshot.dtype,
            device=model.device,
        )


def _complete(request: SampleRequest) -> Completion:
    """Return what a finished request came to."""
    finish = "stop" if request.finish == "stop" else "length"
    tokens, logprobs = tuple(request.tokens), tuple(request.logprobs)
    return Completion(request.prompt, tokens, logprobs, finish)  # type: ignore[arg-type]
