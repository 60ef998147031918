"""transformers gives SentencePiece's ids on the directories that we write, and we those of what it
writes."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from conversations import contents, conversations, trained, with_lowest_spaces
from transformers import AutoTokenizer

from llama2.records import messages_of
from llama2.tokenizer import Tokenizer, encode_dialog, encode_prompt, merges, sentencepiece_model

CASES = Path(__file__).parents[1] / "cases" / "fast_tokenizers.py"


@pytest.fixture(scope="module")
def ordinary(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return trained(tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module", params=["as trained", "lowest spaces"])
def tokenizer(request: pytest.FixtureRequest, ordinary: Tokenizer) -> Tokenizer:
    return ordinary if request.param == "as trained" else with_lowest_spaces(ordinary)


def different(tokenizer: Tokenizer, theirs: Any, count: int) -> int:
    """How many conversations get other ids there."""
    found = 0
    for rows in conversations(count):
        messages = messages_of((row["role"], row["content"]) for row in rows)  # type: ignore[misc]
        finished = messages[-1].role == "assistant"
        ours = (
            encode_dialog(tokenizer, messages)[0]
            if finished
            else encode_prompt(tokenizer, messages)
        )
        found += theirs.apply_chat_template(rows, return_dict=False) != ours

    return found


def test_conversations_have_the_same_ids(
    tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer.save(tmp_path)
    assert tokenizer.describe_differences() == ()
    assert different(tokenizer, AutoTokenizer.from_pretrained(tmp_path), 500) == 0
    assert capsys.readouterr().err == ""


def test_without_tokenizer_json_they_have_not(tmp_path: Path, ordinary: Tokenizer) -> None:
    """So the test above can fail: transformers 5 orders the merges by ids, where there are no
    others."""
    tokenizer = with_lowest_spaces(ordinary)
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    assert different(tokenizer, AutoTokenizer.from_pretrained(tmp_path), 200) > 20


def test_the_library_has_the_same_ids_of_every_text(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Without transformers around it even a space in front is kept; and the merges do there what
    `Merger` says."""
    tokenizer.save(tmp_path)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    merger = merges.make_merger(sentencepiece_model.parse(tokenizer.model, "here").items)
    draw = random.Random(1)

    for text in [contents(draw) for _ in range(800)]:
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert ids == tokenizer.encode(text) == merger.encode(text), text
        assert theirs.decode(ids) == tokenizer.decode(ids)

    assert theirs.encode("a").ids == [tokenizer.bos, *tokenizer.encode("a")]


def test_what_transformers_saves_comes_back(tmp_path: Path, tokenizer: Tokenizer) -> None:
    tokenizer.save(tmp_path / "ours")
    AutoTokenizer.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    assert not (tmp_path / "theirs" / "tokenizer.model").exists()
    again = Tokenizer.load(tmp_path / "theirs")
    assert again.is_same(tokenizer)
    draw = random.Random(2)

    for text in [contents(draw) for _ in range(800)]:
        assert again.encode(text) == tokenizer.encode(text)

    again.save(tmp_path / "again")
    assert different(tokenizer, AutoTokenizer.from_pretrained(tmp_path / "again"), 100) == 0


def test_padding_is_text_there_as_well(tmp_path: Path, ordinary: Tokenizer) -> None:
    size = ordinary.vocab_size
    Tokenizer(sentencepiece_model.pad(ordinary.model, size, size + 2)).save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert len(theirs) == size + 2
    assert theirs.encode(f"[PAD{size}] mill", add_special_tokens=False) == ordinary.encode(
        f"[PAD{size}] mill"
    )


def test_added_tokens_survive_the_round_trip(tmp_path: Path, ordinary: Tokenizer) -> None:
    size = ordinary.vocab_size
    ordinary.save(tmp_path / "ours")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "ours")
    theirs.add_tokens(["<|im_end|>"], special_tokens=True)
    theirs.add_tokens(["<tool>"])
    theirs.save_pretrained(tmp_path / "theirs")
    again = Tokenizer.load(tmp_path / "theirs")
    assert again.controls == {"<s>": 1, "</s>": 2, "<|im_end|>": size}
    assert size not in again.encode("a<|im_end|>b")
    assert again.encode("a<tool>b").count(size + 1) == 1
    again.save(tmp_path / "again")
    back = AutoTokenizer.from_pretrained(tmp_path / "again")
    assert back.convert_tokens_to_ids(["<|im_end|>", "<tool>"]) == [size, size + 1]
    assert back.encode("a<|im_end|>", add_special_tokens=False)[-1] == size


@pytest.mark.skipif(
    "LLAMA2_PEER_TRANSFORMERS4" not in os.environ, reason="LLAMA2_PEER_TRANSFORMERS4 is not set"
)
def test_transformers_4_has_the_same_ids() -> None:
    done = subprocess.run(
        [
            sys.executable,
            CASES,
            "--python",
            os.environ["LLAMA2_PEER_TRANSFORMERS4"],
            "--conversations",
            "300",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(": 0 of ") == 4


def test_the_file_is_what_early_versions_of_the_library_read(
    tmp_path: Path, ordinary: Tokenizer
) -> None:
    ordinary.save(tmp_path)
    model = json.loads((tmp_path / "tokenizer.json").read_bytes())["model"]
    assert all(isinstance(merge, str) and merge.count(" ") == 1 for merge in model["merges"])
