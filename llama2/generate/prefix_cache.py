"""What finished requests have read and written, kept for others whose prompts begin alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from llama2.generate.model_runner import ModelRunner
from llama2.generate.request import Prompt, SampleRequest

MIN_SHARED = 16  # tokens: below, copying saves nothing


class PrefixCache:
    """Token sequences whose keys and values lie in `rows` of the runner's cache, which no request
    decodes. The least recently used one is given up first."""

    def __init__(self, runner: ModelRunner, rows: range) -> None:
        self._runner, self._rows = runner, rows
        self._kept: dict[int, Prompt] = {}  # row -> its tokens; the least recently used first

    @property
    def tokens(self) -> int:
        """Tokens that are kept."""
        return sum(map(len, self._kept.values()))

    def longest_prefix(
        self, prompt: Prompt, running: Mapping[int, SampleRequest]
    ) -> tuple[int, int]:
        """Return the row that shares the longest beginning with a prompt, and its length; length 0
        if it is not worth copying.

        running: the requests of the rows that are decoded, by row; these may be shared too. The
        last token of a prompt is always read anew, for the logits behind it.
        """
        head = prompt[:MIN_SHARED]
        rows = {row: text for row, text in self._kept.items() if text[:MIN_SHARED] == head}
        for slot, request in running.items():
            if request.prompt[:MIN_SHARED] == head[: len(request.prompt)]:
                rows[slot] = request.read_tokens

        lengths = {
            row: min(_count_common(prompt, tokens), len(prompt) - 1) for row, tokens in rows.items()
        }
        longest = max(lengths, key=lambda row: lengths[row], default=0)
        if lengths.get(longest, 0) < MIN_SHARED:
            return 0, 0

        if longest in self._kept:
            self._kept[longest] = self._kept.pop(longest)

        return longest, lengths[longest]

    def keep(self, slot: int, tokens: Prompt) -> None:
        """Copy what has been read into a slot, in the place of a shorter beginning of it, or of the
        least recently used."""
        beginnings = [row for row, text in self._kept.items() if text == tokens[: len(text)]]
        free = [row for row in self._rows if row not in self._kept]
        candidates = [*beginnings, *free, *self._kept]
        if candidates and len(tokens) >= MIN_SHARED:
            row = candidates[0]
            self._kept.pop(row, None)
            self._kept[row] = tokens
            self._runner.copy([slot], [row], len(tokens))


def _count_common(a: Sequence[int], b: Sequence[int]) -> int:
    """Return how many tokens two sequences share from their beginning."""
    length = min(len(a), len(b))
    different = np.flatnonzero(np.array(a[:length]) != np.array(b[:length]))
    return int(different[0]) if len(different) else length
