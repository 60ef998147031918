"""What is exported, in the hands of those who use it: the same tokens from transformers and from
our own engine.

The transformers of this environment always takes part. LLAMA2_TRANSFORMERS4_PYTHON names an
interpreter with transformers 4, LLAMA2_LLAMACPP_PYTHON one with llama-cpp-python;
LLAMA2_RELEASED_MODEL a trained model to try besides the random one. CONTRIBUTING.md says how to run
these; what is not named is skipped.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import llama2
from sources import SHAPE, STRINGS, model_of

from llama2.formats import checkpoint
from llama2.formats.detect import open_model
from llama2.generate.engine import Engine
from llama2.generate.sampling import Sampling
from llama2.model.llama import Llama
from llama2.tokenizer import Tokenizer

PROMPTS, COUNT = 20, 200
TIE = 1e-3
Ask = Callable[[dict[str, Any]], Any]
Answers = dict[tuple[int, ...], list[int]]
TRAINED = os.environ.get("LLAMA2_RELEASED_MODEL")


def peers(kind: str, variable: str) -> Any:
    """An interpreter that a variable names, or a test that is skipped."""
    path = os.environ.get(variable)
    return pytest.param(
        (kind, path),
        id=kind,
        marks=pytest.mark.skipif(path is None, reason=f"{variable} names no interpreter"),
    )


@contextmanager
def peer(script: str, python: str, begin: dict[str, Any]) -> Iterator[Ask]:
    """A process of another program that answers questions about one model."""
    with subprocess.Popen(
        [python, str(Path(__file__).with_name(script))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={"PATH": os.environ["PATH"], "HF_HUB_OFFLINE": "1"},
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def ask(question: dict[str, Any]) -> Any:
            print(json.dumps(question), file=process.stdin, flush=True)
            return json.loads(process.stdout.readline())

        ask(begin)
        yield ask
        process.stdin.close()


def answers(model: Llama, prompts: Sequence[Sequence[int]]) -> Answers:
    """What our engine says, greedily, to those prompts on whose way no two tokens are nearly
    equally likely.

    At a tie the order of sums decides, which is every program's own.
    """
    engine = Engine(model, precision="fp32")
    found: Answers = {}
    for prompt, [completion] in zip(
        prompts, engine.generate(prompts, Sampling(temperature=0.0, max_tokens=COUNT))
    ):
        with torch.no_grad():
            logits_TV = model(torch.tensor([[*prompt, *completion.tokens]]))[
                0, len(prompt) - 1 : -1
            ]

        first_T, second_T = logits_TV.topk(2).values.unbind(-1)
        if (first_T - second_T).min() > TIE:
            assert len(completion.tokens) == COUNT
            found[tuple(prompt)] = list(completion.tokens)

    return dict(list(found.items())[:PROMPTS])


@pytest.fixture(
    scope="module",
    params=[
        "random",
        pytest.param(
            "trained",
            marks=pytest.mark.skipif(
                TRAINED is None, reason="LLAMA2_RELEASED_MODEL names no model"
            ),
        ),
    ],
)
def original(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer
) -> Path:
    if request.param == "trained":
        return Path(str(TRAINED))

    path = tmp_path_factory.mktemp("released") / "original"
    checkpoint.save(model_of(SHAPE), path)
    tokenizer.save(path)

    return path


@pytest.fixture(scope="module")
def expected(original: Path) -> Answers:
    """Twenty prompts and their answers, from the model that was never exported."""
    model, pieces = checkpoint.load(original), Tokenizer.load(original)
    draw = random.Random(0)
    prompts = [
        [pieces.bos, *(draw.randrange(3, pieces.vocab_size) for _ in range(draw.randrange(1, 60)))]
        for _ in range(2 * PROMPTS)
    ]
    found = answers(model, prompts)
    assert len(found) == PROMPTS

    return found


@pytest.fixture(scope="module")
def exported(original: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("exported")
    paths = {
        "hf": out / "hf",
        "meta": out / "meta",
        "gguf": out / "model.gguf",
        "llama2c": out / "model.bin",
    }
    for kind, path in paths.items():
        shards = ["--shards", 2] if kind == "meta" else []
        assert llama2("export", original, "--to", kind, "--out", path, *shards, "--length", 32) == 0

    return paths


@pytest.mark.parametrize("kind", ["hf", "meta", "gguf", "llama2c"])
def test_our_engine_says_the_same_from_every_format(
    exported: dict[str, Path], expected: Answers, kind: str
) -> None:
    source = open_model(exported[kind])
    model = Llama(source.config).eval()
    model.load_state_dict({name: stored.read() for name, stored in source.tensors.items()})
    engine = Engine(model, precision="fp32", capacity=512)
    said = engine.generate(list(expected), Sampling(temperature=0.0, max_tokens=COUNT))
    assert [list(completion.tokens) for [completion] in said] == list(expected.values())


@pytest.mark.parametrize(
    "python",
    [
        pytest.param(("here", sys.executable), id="transformers"),
        peers("transformers4", "LLAMA2_TRANSFORMERS4_PYTHON"),
    ],
)
def test_transformers_says_the_same(
    exported: dict[str, Path], expected: Answers, python: tuple[str, str]
) -> None:
    pieces = Tokenizer.load(exported["hf"])
    with peer("transformers_peer.py", python[1], {"directory": str(exported["hf"])}) as ask:
        for prompt, answer in expected.items():
            assert ask({"greedy": prompt, "count": COUNT}) == answer

        for text in STRINGS:
            # docs/formats.md: typed control items, and one of several leading spaces, are theirs to
            # lose
            if not any(item in text for item in ("<s>", "</s>", "<unk>")) and not text.startswith(
                (" ", "▁")
            ):
                assert ask({"tokenize": text}) == pieces.encode(text), text


@pytest.mark.parametrize("python", [peers("llama.cpp", "LLAMA2_LLAMACPP_PYTHON")])
def test_llama_cpp_says_the_same(
    exported: dict[str, Path], expected: Answers, python: tuple[str, str]
) -> None:
    with peer(
        "llama_cpp_peer.py", python[1], {"file": str(exported["gguf"]), "context": 512}
    ) as ask:
        for prompt, answer in expected.items():
            assert ask({"greedy": prompt, "count": COUNT}) == answer
