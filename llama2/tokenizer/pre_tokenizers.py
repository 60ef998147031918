"""Name the ways in which byte-level tokenizers divide a text into words.

A `tokenizer.json` spells a way out as steps of the library `tokenizers`; GGUF has only its name in
llama.cpp, under `tokenizer.ggml.pre`. Here are those of which both are known. Where a name stands
for several families in llama.cpp, the first one is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_NUMBERS_IN_THREES = r"\p{N}{1,3}"
_SINGLE_DIGITS = r"\p{N}"


@dataclass(frozen=True)
class PreTokenizer:
    """A way to divide texts, in the words of `tokenizer.json`.

    `ignore_merges`: a word that is an item as a whole is taken at once. `adds_bos`: llama.cpp puts
    BOS in front of a text if a file does not say whether.
    """

    normalizer: Mapping[str, Any] | None
    steps: Mapping[str, Any]
    ignore_merges: bool = False
    adds_bos: bool = False

    def is_written(self, values: Mapping[str, Any]) -> bool:
        """Return whether a `tokenizer.json` divides texts in this way."""
        return (
            reduce_step(values.get("normalizer")) == reduce_step(self.normalizer)
            and reduce_step(values.get("pre_tokenizer")) == reduce_step(self.steps)
            and bool(values["model"].get("ignore_merges")) == self.ignore_merges
        )


def find_name(values: Mapping[str, Any]) -> str | None:
    """Return llama.cpp's name of the way in which a `tokenizer.json` divides texts, if it has one.

    llama.cpp normalises nothing, so the name for texts in NFC is that of the same way without.
    """
    for name, known in PRE_TOKENIZERS.items():
        if known.is_written(values):
            return name

    return None


def reduce_step(step: Any) -> Any:
    """Return a step without the settings that change no id, and a sequence of one as that one."""
    if not isinstance(step, Mapping):
        return step

    parts = step.get("pretokenizers", step.get("normalizers"))
    if step.get("type") == "Sequence" and isinstance(parts, list) and len(parts) == 1:
        return reduce_step(parts[0])

    reduced = {key: value for key, value in step.items() if key != "trim_offsets"}
    for key, value in reduced.items():
        if isinstance(value, list):
            reduced[key] = list(map(reduce_step, value))

    return reduced


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": use_regex,
    }


def _join(*steps: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(steps)}


def _split_words(numbers: str) -> dict[str, Any]:
    """Return the expression that came with cl100k: words take a sign in front, lines stay apart."""
    expression = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
        + numbers
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    split = {
        "type": "Split",
        "pattern": {"Regex": expression},
        "behavior": "Isolated",
        "invert": False,
    }
    return _join(split, _byte_level(use_regex=False))


_GPT_2 = PreTokenizer(None, _byte_level(use_regex=True))
_DIGITS_APART = PreTokenizer(
    None, _join({"type": "Digits", "individual_digits": True}, _byte_level(use_regex=True))
)
_LLAMA_3 = PreTokenizer(None, _split_words(_NUMBERS_IN_THREES), ignore_merges=True, adds_bos=True)
_DBRX = PreTokenizer(None, _split_words(_NUMBERS_IN_THREES))
_QWEN_2 = PreTokenizer({"type": "NFC"}, _split_words(_SINGLE_DIGITS))

PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {
    "gpt-2": _GPT_2,
    "smollm": _DIGITS_APART,
    "starcoder": _DIGITS_APART,
    "refact": _DIGITS_APART,
    "llama-bpe": _LLAMA_3,
    "llama3": _LLAMA_3,
    "llama-v3": _LLAMA_3,
    "dbrx": _DBRX,
    "smaug-bpe": _DBRX,
    "qwen2": _QWEN_2,
    "deepseek-r1-qwen": _QWEN_2,
}
"""llama.cpp's name -> what it stands for"""
