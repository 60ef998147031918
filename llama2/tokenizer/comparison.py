"""Compare a list of merges with SentencePiece, on texts on which tokenizers disagree.

transformers 5, vLLM and all else built on the library `tokenizers` take the merges of
`tokenizer.json`, so they are compared with SentencePiece before anybody relies on them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

from llama2.terminal_text import list_some
from llama2.tokenizer import merges
from llama2.tokenizer.merges import Merger
from llama2.tokenizer.sentencepiece_model import (
    NORMAL,
    SPACE,
    USER_DEFINED,
    Vocabulary,
    VocabularyItem,
)

_SAMPLE = 400  # items that are tried alone, and in a row
_ROWS = 60
_LONGEST = 64  # characters of an item that is tried
_HARD = (
    "",
    "a",
    "The mill.  It was built in 1746.",
    "\tx\t\ty",
    "\n\n\n",
    "a\r\nb",
    "a\u00a0b\u3000c",
    "tail   ",
    "<s>",
    "</s>",
    "<unk> </s><s>",
    "<0x0A><0x41>",
    "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST]",
    "<|im_start|>user",
    "1234567890",
    "3.14159 -5e-3",
    "été naïve Straße İı",
    "日本語のテキスト",
    "привет, мир",
    "مرحبا بالعالم",
    "שלום",
    "नमस्ते",
    "안녕하세요",
    "😀👍🏽👩\u200d👩\u200d👧",
    "e\u0301 \u212b ﬁ",
    "\x00\x01\x7f",
    "\ufeffx\ufffd",
    "\U0010ffff\ue000",
    "def f(x):\n        return {'k': [x]}  # c",
    "a" * 20,
    "-" * 20,
    "=" * 16,
    "ab" * 8,
    "https://example.org/a?b=c&d=%20#e",
    "x" * 33,
    "…“quoted”—don't",
)

Encode = Callable[[str], list[int]]


def describe_differences(vocabulary: Vocabulary, encode: Encode) -> list[str]:
    """List, in sentences for the user, where transformers gives other ids than `encode`.

    The list is empty for a tokenizer such as Llama 2's.
    """
    notes = vocabulary.describe_losses("transformers")
    typed = [ascii(item.text) for item in vocabulary.items if item.kind == USER_DEFINED]
    if typed:
        notes.append(
            "the tokenizer has items that are looked for before all else "
            f"({list_some(typed, 3)}), and transformers puts a space behind them: texts with one "
            "get other tokens there"
        )
    if notes:
        return notes

    difference = find_difference(merges.make_merger(vocabulary.items), vocabulary.items, encode)
    if difference is None:
        return []

    return [
        "some of the tokenizer's items have equal scores, and tokenizer.json cannot say so: "
        f"transformers gives other ids for some texts ({difference})"
    ]


def find_difference(merger: Merger, items: Sequence[VocabularyItem], encode: Encode) -> str | None:
    """Describe the first of some texts for which merges give other ids than `encode`.

    Items that are looked for before all else do not depend on merges: a text with one is left out.
    """
    sought = [item.text.replace(SPACE, " ") for item in items if item.kind == USER_DEFINED]
    for text in list_texts(items):
        if any(item in text for item in sought):
            continue

        theirs, ours = merger.encode(text), encode(text)
        if theirs != ours:
            at = find_parting(ours, theirs)
            shown = ascii(text) if len(text) <= 40 else f"{text[:40]!a}..."
            return f"{shown}: {theirs[at : at + 4]} for {ours[at : at + 4]}"

    return None


def find_parting(a: Sequence[int], b: Sequence[int]) -> int:
    """Return the first index at which two sequences differ, or the length of the shorter."""
    for index, (left, right) in enumerate(zip(a, b)):
        if left != right:
            return index

    return min(len(a), len(b))


def list_texts(items: Sequence[VocabularyItem]) -> Iterator[str]:
    """Yield short texts on which tokenizers disagree.

    They are runs of spaces, bytes, typed control items, and items of the vocabulary.
    """
    for run in range(1, 41):
        yield " " * run
        yield f"if x:\n{' ' * run}return{' ' * run}1"

    yield from _HARD

    words = [
        item.text.replace(SPACE, " ")
        for item in items
        if item.kind == NORMAL and len(item.text) <= _LONGEST
    ]
    yield from words[:: len(words) // _SAMPLE + 1]

    draw = random.Random(0)
    parts: list[Callable[[], str]] = [
        lambda: draw.choice(words),
        lambda: draw.choice(words),
        lambda: " " * draw.randint(1, 20),
        lambda: draw.choice("-=_*#.ab\n\t") * draw.randint(1, 12),
        lambda: draw.choice("éß日本語🙂אבक\u200d\u0301"),
    ]

    for _ in range(_ROWS if words else 0):
        yield "".join(draw.choice(parts)() for _ in range(6))
