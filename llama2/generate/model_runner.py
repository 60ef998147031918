"""Forward passes of a model over a KV cache: whole prompts, parts of prompts, newest tokens.

On a CPU our own decoding step reads the packed weights, and short prompts too; longer ones are
quicker in PyTorch's large products. On a GPU a step may be launched as a whole, as a CUDA graph.

Shapes: B live rows, P prompts read together, T their longest, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from llama2.generate.cpu_decoder import CpuDecoder
from llama2.generate.graphed_decoder import GraphedDecoder, list_tensors
from llama2.generate.request import Prompt
from llama2.model.cache import KVCache
from llama2.model.llama import Llama

PREFILL_TOKENS = 4096  # padded tokens of one forward pass over prompts
DECODER_TOKENS = 256  # of prompts that the decoder reads in one call
DECODER_PREFILL_TOKENS = 1024  # more prompt tokens than this at once are quicker in PyTorch
# of a new token and one before it: attention to more is quicker in PyTorch
DECODER_PAIRS = 2 * DECODER_TOKENS**2
COLUMNS = 16  # the number of columns read is a multiple of this, so that kernels meet few shapes


class ModelRunner:
    """Runs `model` on the rows of `cache`; `decoder` holds its weights for a CPU, `graphs` the
    steps that were recorded on a GPU over this cache, where there are any."""

    def __init__(
        self,
        model: Llama,
        cache: KVCache,
        decoder: CpuDecoder | None = None,
        graphs: GraphedDecoder | None = None,
    ) -> None:
        self.cache, self.graphs = cache, graphs
        self.vocab_size = model.config.vocab_size
        self.device = model.device
        self._model, self._decoder = model, decoder
        self._weights = [] if graphs is None else list_tensors(model)

    def decode(self, tokens_B: Tensor, positions_B: Tensor, longest: int) -> Tensor:
        """Append one token to each of the first B rows; returns logits_BV (fp32), which last until
        the next call.

        `longest`: more than the largest position.
        """
        if self._decoder is not None:
            return self._decoder(tokens_B, positions_B, self.cache)

        if self.graphs is not None and self.graphs.takes(len(tokens_B)):
            return self.graphs(self._model, self._weights, tokens_B, positions_B, longest)

        columns = -(-longest // COLUMNS) * COLUMNS
        self.cache.decode(positions_B, min(columns, self.cache.capacity))
        logits_B1V: Tensor = self._model(
            tokens_B[:, None], positions_BT=positions_B[:, None], cache=self.cache
        )
        return logits_B1V[:, 0]

    def prefill(self, rows: Mapping[Prompt, int]) -> dict[Prompt, Tensor]:
        """Read each prompt into its row; returns the logits_V (fp32) behind its last token."""
        prompts = sorted(rows, key=len, reverse=True)
        logits: dict[Prompt, Tensor] = {}

        if self._decoder is not None and sum(map(len, prompts)) <= DECODER_PREFILL_TOKENS:
            short = [prompt for prompt in prompts if len(prompt) <= DECODER_TOKENS]
            prompts = prompts[: len(prompts) - len(short)]
            for part in _split(short, DECODER_TOKENS):
                logits_PV = self._read([(rows[prompt], 0, prompt) for prompt in part])
                logits.update(zip(part, logits_PV))

        for part in _split(prompts, PREFILL_TOKENS):
            logits_PV = self._read_padded(part, [rows[prompt] for prompt in part])
            logits.update(zip(part, logits_PV))

        return logits

    def extend(self, row: int, begin: int, tokens: Sequence[int]) -> Tensor:
        """Read more tokens of a prompt into `row`, from column `begin`; returns the logits_V (fp32)
        behind the last."""
        width = len(tokens)
        small = width <= DECODER_TOKENS and width * (begin + width) <= DECODER_PAIRS
        if self._decoder is not None and small:
            return self._read([(row, begin, tokens)])[0]

        self.cache.extend(row, begin, width)
        tokens_1T = torch.tensor([tokens], device=self.device)
        positions_1T = torch.arange(begin, begin + width, device=self.device)[None]
        hidden_1TD = self._model(tokens_1T, positions_BT=positions_1T, cache=self.cache, head=False)

        return self._model.logits(hidden_1TD[0, -1])

    def copy(self, sources: Sequence[int], targets: Sequence[int], columns: int) -> None:
        """Copy the first `columns` columns of some rows to others."""
        sources_S = torch.tensor(sources, device=self.device)
        targets_S = torch.tensor(targets, device=self.device)
        self.cache.copy(sources_S, targets_S, columns)

    def _read(self, pieces: Sequence[tuple[int, int, Sequence[int]]]) -> Tensor:
        """Read pieces of prompts, (row, begin, tokens), by the decoder; returns the logits_PV
        behind the last token of each."""
        assert self._decoder is not None
        entries: list[tuple[int, int, int]] = []
        last = []
        for row, begin, tokens in pieces:
            entries += [(token, row, position) for position, token in enumerate(tokens, begin)]
            last.append(len(entries) - 1)

        tokens_B, rows_B, positions_B = torch.tensor(entries).T.contiguous()
        last_P = torch.tensor(last)
        return self._decoder.read(tokens_B, rows_B, positions_B, last_P, self.cache)

    def _read_padded(self, prompts: Sequence[Prompt], rows: Sequence[int]) -> Tensor:
        """Read prompts, longest first, in one forward pass; returns the logits_PV behind the last
        token of each."""
        width = len(prompts[0])
        padded = [(*prompt, *(0,) * (width - len(prompt))) for prompt in prompts]
        tokens_PT = torch.tensor(padded, device=self.device)
        last_P = torch.tensor([len(prompt) - 1 for prompt in prompts], device=self.device)

        self.cache.prefill(torch.tensor(rows, device=self.device), width)
        hidden_PTD = self._model(tokens_PT, cache=self.cache, head=False)
        last_PD = hidden_PTD[torch.arange(len(prompts), device=self.device), last_P]

        return self._model.logits(last_PD)


def _split(prompts: Sequence[Prompt], tokens: int) -> Iterator[Sequence[Prompt]]:
    """Yield prompts, longest first, in parts of at most `tokens` padded tokens (or one prompt)."""
    start = 0
    while start < len(prompts):
        rows = max(1, tokens // len(prompts[start]))
        yield prompts[start : start + rows]
        start += rows
