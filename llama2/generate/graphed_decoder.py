"""One step of decoding on a GPU as one launch: a CUDA graph of it, recorded once and launched again
for every further token.

A step makes some thirty small kernels a layer, and Python takes longer to ask for most of them than
the device to run them. A graph does the same work on the same tensors, so whatever changes lies in
tensors that stay where they are: newest tokens, positions, keys and values, weights. Its shapes
stay too: rows and columns are rounded up, and each pair of them has a graph.

- Rows that are added are decoded at the last column of the cache, as are those that `Slots.reserve`
  keeps: no sample reads that column, because the last token that fits is drawn and never read.
- Columns that are added are masked and have weight 0.
- Steps that are not yet recorded run on the same rounded shapes. So a sample is the same to the bit
  whether and when its steps were recorded. It differs from one of exact shapes by rounding, as
  from one in other company: kernels are chosen by shapes.

Shapes: B live rows, N rows at most, R rows of a graph, V vocabulary.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from llama2 import devices, environment
from llama2.kernels import is_known
from llama2.model.cache import KVCache
from llama2.model.llama import Llama

# Of one shape before it is recorded. That takes as long as about five steps: one to warm up, one to
# record, and what the driver makes of it. After so many steps as many more are likely.
EAGER_STEPS = 8
MOST_GRAPHS = 32  # at once: each holds some MiB of the driver's memory
ROWS = 8  # more rows are rounded to a multiple of this
COLUMNS = 128  # columns are rounded to a multiple of this, and the more there are, to a larger one
_KINDS = (torch.float32, torch.bfloat16, torch.float16)

failures: list[str] = []
"""why nothing can be recorded here, once that is known"""


def supports(model: Llama, cache: KVCache) -> bool:
    """Tell whether steps of this model may be recorded: it must be exactly the network, whole, with
    plain weights beside the cache, and neither hooked, wrapped nor compiled."""
    return (
        not failures
        and environment.wants_graphs()
        and is_known(model)
        and not any(module._compiled_call_impl for module in model.modules())
        and _are_plain(list_tensors(model), cache.data_LPNCKD.device)
    )


def _are_plain(weights: Sequence[Tensor], device: torch.device) -> bool:
    return all(
        type(weight) in (Tensor, nn.Parameter)
        and weight.dtype in _KINDS
        and weight.device == device
        for weight in weights
    )


def find_decoder(
    model: Llama, cache: KVCache, rows: int, earlier: GraphedDecoder | None
) -> GraphedDecoder | None:
    """Return what decodes the first `rows` rows of the cache, or fewer: the `earlier` one of this
    cache if there is one. None where steps are not recorded."""
    make_recorder = devices.find_recorder(cache.data_LPNCKD.device)
    if make_recorder is None or not supports(model, cache):
        return None

    return earlier or GraphedDecoder(cache, rows, model.config.vocab_size, make_recorder)


def list_tensors(model: nn.Module) -> list[Tensor]:
    """Return the weights that a graph reads."""
    return [*model.parameters(), *model.buffers()]


def round_rows(live: int, most: int) -> int:
    """Return for how many rows a step of `live` ones is recorded: 1, 2, 4, or a multiple of 8, but
    at most `most`."""
    rows = 1 << (live - 1).bit_length() if live < ROWS else -(-live // ROWS) * ROWS
    return min(rows, most)


def round_columns(longest: int, capacity: int) -> int:
    """Return how many columns are read for rows of at most `longest` tokens: four numbers between a
    power of two and the next, the least of them 128, but at most `capacity`."""
    step = max(COLUMNS, (1 << (longest - 1).bit_length()) // 8)
    return min(-(-longest // step) * step, capacity)


class GraphedDecoder:
    """Steps over the first `rows` rows of `cache`, recorded by what `make_recorder` makes.

    It knows the weights of its graphs by their places in memory alone: other values there are those
    of the next step, and weights at other places make it forget all graphs.
    """

    def __init__(
        self,
        cache: KVCache,
        rows: int,
        vocab_size: int,
        make_recorder: Callable[[], devices.Record],
    ) -> None:
        device = cache.data_LPNCKD.device
        self.cache, self._make_recorder = cache, make_recorder
        self._tokens_N = torch.zeros(rows, dtype=torch.long, device=device)
        self._positions_N = torch.full_like(self._tokens_N, cache.capacity - 1)
        self._logits_NV = torch.zeros(rows, vocab_size, device=device)
        self._filled = 0  # rows that the last step gave tokens
        self._places: list[tuple[int, torch.dtype]] = []
        self._graphs: dict[tuple[int, int], devices.Work] = {}  # the least recently used first
        self._steps: Counter[tuple[int, int]] = Counter()  # that ran without a graph, by shape
        self._record: devices.Record | None = None

    def takes(self, rows: int) -> bool:
        """Tell whether a step of so many rows can run here and now: nothing may want gradients, nor
        other types than the weights'."""
        return (
            rows <= len(self._tokens_N)
            and torch.is_inference_mode_enabled()
            and not torch.is_autocast_enabled(self._tokens_N.device.type)
        )

    def __call__(
        self,
        model: Llama,
        weights: Sequence[Tensor],
        tokens_B: Tensor,
        positions_B: Tensor,
        longest: int,
    ) -> Tensor:
        """Append one token to each of the first B rows; return logits_BV (fp32), which last until
        the next call.

        weights: `list_tensors(model)`. longest: more than the largest position.
        """
        live = len(tokens_B)
        self._fill(tokens_B, positions_B)
        self._check_places(weights)
        rows = round_rows(live, len(self._tokens_N))
        columns = round_columns(longest, self.cache.capacity)
        work = partial(self._step, model, rows, columns)
        if not self._launch((rows, columns), work):
            work()

        return self._logits_NV[:live]

    def forget(self) -> None:
        """Give up all graphs, with the memory that they share."""
        devices.synchronize(self._tokens_N.device)
        self._graphs.clear()
        self._steps.clear()
        self._record = None  # the memory of a recorder goes with its last graph

    def _fill(self, tokens_B: Tensor, positions_B: Tensor) -> None:
        """Put tokens and positions where graphs read them; rows behind them go out of the way."""
        live = len(tokens_B)
        self._tokens_N[:live] = tokens_B
        self._positions_N[:live] = positions_B
        if live < self._filled:
            self._positions_N[live : self._filled] = self.cache.capacity - 1

        self._filled = live

    def _check_places(self, weights: Sequence[Tensor]) -> None:
        places = [(tensor.data_ptr(), tensor.dtype) for tensor in weights]
        if places != self._places:
            self.forget()
            self._places = places

    def _launch(self, shape: tuple[int, int], work: devices.Work) -> bool:
        """Launch the graph of the work of this shape, if it has one or is to have one now; return
        whether that was done. Work may be done twice: it writes the same again."""
        if failures:  # which are those of the device, so that no graph is certain any more
            return False

        graph = self._graphs.pop(shape, None)
        if graph is None:
            self._steps[shape] += 1
            if self._steps[shape] <= EAGER_STEPS:
                return False

        try:
            self._graphs[shape] = graph or self._make_graph(work)
            self._graphs[shape]()
        except RuntimeError as error:
            self._give_up(error)
            return False

        return True

    def _make_graph(self, work: devices.Work) -> devices.Work:
        if len(self._graphs) == MOST_GRAPHS:
            devices.synchronize(self._tokens_N.device)
            oldest = next(iter(self._graphs))
            del self._graphs[oldest], self._steps[oldest]

        self._record = self._record or self._make_recorder()
        return self._record(work)

    def _give_up(self, error: RuntimeError) -> None:
        """Record nothing more in this process, and say so."""
        cause = f"{type(error).__name__}: {error}".splitlines()[0]
        failures.append(cause)
        self.forget()
        print(
            f"decoding is slower than it could be: its steps cannot be recorded as CUDA graphs "
            f"({cause})",
            file=sys.stderr,
        )

    def _step(self, model: Llama, rows: int, columns: int) -> None:
        """Decode `rows` rows, of which `columns` columns are read."""
        positions_R = self._positions_N[:rows]
        self.cache.decode(positions_R, columns)
        logits_R1V = model(
            self._tokens_N[:rows, None], positions_BT=positions_R[:, None], cache=self.cache
        )
        self._logits_NV[:rows] = logits_R1V[:, 0]
