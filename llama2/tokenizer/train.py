"""Train the tokenizer of §2.2: SentencePiece BPE, numbers split into digits, bytes for unknown
characters.

The paper names those three properties and the size of the vocabulary (32,000). The other options
are those commonly read out of the published model: no normalisation, spaces kept, pieces of at most
16 characters that do not cross a change of script, a number or a space.
"""

from __future__ import annotations

import heapq
import io
import os
import random
import re
from collections.abc import Iterable, Iterator

import sentencepiece

from llama2.errors import UserError
from llama2.tokenizer.tokenizer import BOS, EOS, UNKNOWN, Tokenizer

_LINE_BYTES = 4192  # SentencePiece drops longer lines
_SPECIAL = 3 + 256  # unknown, BOS, EOS and the bytes


def train(
    texts: Iterable[str],
    vocab_size: int,
    directory: str | os.PathLike[str],
    *,
    seed: int = 0,
    sample_bytes: int = 200_000_000,
    character_coverage: float = 0.99995,
) -> Tokenizer:
    """Train on `texts`, or on a random sample of about `sample_bytes` of them, and save into
    `directory`.

    The same texts in the same order with the same seed give the same file. Memory is bounded by the
    sample. UserError when the text does not support so many items, or when there are more
    characters than items.
    """
    sample = _sample(texts, sample_bytes, seed)
    if not any(line for text in sample for line in _lines(text)):
        raise UserError("there is no text to train a tokenizer on", "check the documents")
    if vocab_size <= _SPECIAL:
        raise UserError(
            f"vocab_size {vocab_size} leaves no room beside {_SPECIAL} control and byte items",
            f"choose more than {_SPECIAL}",
        )

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(line for text in sample for line in _lines(text)),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=character_coverage,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=True,
            byte_fallback=True,
            split_digits=True,
            split_by_number=True,
            split_by_unicode_script=True,
            split_by_whitespace=True,
            allow_whitespace_only_pieces=True,
            max_sentencepiece_length=16,
            max_sentence_length=_LINE_BYTES,
            unk_id=UNKNOWN,
            bos_id=BOS,
            eos_id=EOS,
            pad_id=-1,
            num_threads=1,  # the file records it
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _explain(str(error), vocab_size) from error

    tokenizer = Tokenizer(model.getvalue())
    tokenizer.save(directory)
    return tokenizer


def _sample(texts: Iterable[str], limit: int, seed: int) -> list[str]:
    """Return a uniform sample of the texts, of at most `limit` bytes, in their order.

    It has one text at least.
    """
    draw = random.Random(seed).random
    heap: list[tuple[float, int, str]] = []  # the smallest draws stay
    size = 0

    for index, text in enumerate(texts):
        heapq.heappush(heap, (-draw(), index, text))
        size += len(text.encode())
        while size > limit and len(heap) > 1:
            size -= len(heapq.heappop(heap)[2].encode())

    chosen = sorted((index, text) for _, index, text in heap)
    return [text for _, text in chosen]


def _lines(text: str) -> Iterator[str]:
    """Yield the lines of a text, long ones cut at a space.

    Newlines stay out of the vocabulary: they are a byte item.
    """
    longest = _LINE_BYTES // 4  # four bytes a character at most
    for line in text.split("\n"):
        start = 0
        while len(line) - start > longest:
            cut = line.rfind(" ", start + 1, start + longest)
            end = cut if cut > 0 else start + longest
            yield line[start:end]
            start = end + (cut > 0)

        if start < len(line):
            yield line[start:]


def _explain(message: str, vocab_size: int) -> Exception:
    """Return SentencePiece's refusal in the user's words; any other error is a defect."""
    if match := re.search(r"Vocabulary size too high .*<= (\d+)", message):
        return UserError(
            f"vocab_size {vocab_size} is too large for this text, which supports {match[1]} items",
            f"choose at most {match[1]}, or give more text",
        )
    if match := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return UserError(
            f"vocab_size {vocab_size} is too small: the characters of this text alone take "
            f"{match[1]}",
            f"choose more than {match[1]}",
        )

    return RuntimeError(message)
