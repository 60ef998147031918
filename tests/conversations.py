"""Conversations that are hard to tokenize, and tokenizers to try them on."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from llama2.tokenizer import Tokenizer, sentencepiece_model, train
from llama2.tokenizer.sentencepiece_model import NORMAL, SPACE, VocabularyItem

LOWEST = -1e9
"""the score of runs of spaces in the published model"""
LONGEST = 16
"""of its runs of spaces"""

_WORDS = [
    "the",
    "river",
    "runs",
    "slowly",
    "past",
    "old",
    "mill",
    "Miller",
    "counts",
    "sacks",
    "of",
    "flour",
    "and",
    "return",
    "None",
    "if",
    "for",
    "x",
    "été",
    "naïve",
    "Straße",
    "мельница",
    "水車",
    "مطحنة",
]
_SIGNS = [
    "\t",
    "\n",
    "\n\n",
    "\r\n",
    "\u00a0",
    "\u3000",
    "\u200b",
    "\u2028",
    SPACE,
    "e\u0301",
    "🇩🇪",
    "👩\u200d👩\u200d👧",
    "\x00",
    "\x7f",
    "\ufeff",
    "\U0010ffff",
    "ﬁ",
    "½",
    "1746",
    "3.14",
    *'-_=#*.,:(){}"',
]
_TAGS = [
    "[INST]",
    "[/INST]",
    "<<SYS>>\n",
    "\n<</SYS>>\n\n",
    "<0x0A>",
    "<0x41>",
    "< s>",
    "</ s>",
    "<S>",
    "[PAD300]",
    "<|im_start|>",
    "<|im_end|>",
    "<pad>",
    "s>",
    "</",
    "<unk",
]


def contents(draw: random.Random) -> str:
    """What somebody may say. It spells no BOS, EOS or unknown item: these transformers takes out of
    a text."""
    kinds = [
        lambda: " ".join(draw.choices(_WORDS, k=draw.randint(1, 6))),
        lambda: draw.choice(_WORDS),
        lambda: " " * draw.randint(1, 40),
        lambda: draw.choice(_SIGNS) * draw.choice((1, 1, 1, 2, 3, 9)),
        lambda: draw.choice(_TAGS),
        lambda: f"{draw.choice(_WORDS)}.  {draw.choice(_WORDS).capitalize()}",
        lambda: f"def f(x):\n{' ' * draw.randint(1, 12)}return x{' ' * draw.randint(0, 8)}# y\n",
        lambda: chr(draw.randint(*draw.choice(((32, 126), (160, 0xD7FF), (0xE000, 0x1FFFF))))),
    ]
    text = "".join(draw.choice(kinds)() for _ in range(draw.randint(0, 8)))
    return text if not any(name in text for name in ("<s>", "</s>", "<unk>")) else "the mill"


def conversations(count: int, seed: int = 0) -> Iterator[list[dict[str, str]]]:
    """Of one to four turns, with a system message or none, finished or waiting for an answer."""
    draw = random.Random(seed)
    for _ in range(count):
        rows = [("system", contents(draw))] if draw.random() < 0.4 else []
        rows += [
            (("user", "assistant")[turn % 2], contents(draw)) for turn in range(draw.randint(1, 8))
        ]
        yield [{"role": role, "content": content} for role, content in rows]


def trained(directory: Path, size: int = 420) -> Tokenizer:
    """A tokenizer with scores as its trainer gives them."""
    draw = random.Random(0)
    texts = [
        f"{' '.join(draw.choices(_WORDS, k=12)).capitalize()}.  In {draw.randint(1000, 2030)}:\n"
        f"{' ' * draw.choice((2, 4, 8))}return {draw.choice(_WORDS)}  # [INST] -- == \n"
        for _ in range(400)
    ]
    return train(texts, size, directory)


def with_lowest_spaces(tokenizer: Tokenizer) -> Tokenizer:
    """The same tokenizer with all runs of spaces up to the longest, and their scores the lowest, as
    in Meta's file."""
    found = sentencepiece_model.parse(tokenizer.model, "a tokenizer")
    lowest = [
        replace(item, score=LOWEST) if item.kind == NORMAL and not item.text.strip(SPACE) else item
        for item in found.items
    ]
    known = {item.text for item in lowest}
    more = [
        VocabularyItem(SPACE * run, LOWEST)
        for run in range(2, LONGEST + 1)
        if SPACE * run not in known
    ]
    random.Random(0).shuffle(more)  # their ids are in no order there, either

    return Tokenizer(sentencepiece_model.build(replace(found, items=[*lowest, *more])))
