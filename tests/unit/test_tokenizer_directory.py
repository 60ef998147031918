"""Directories that others wrote: `tokenizer.json` alone, tokens that were added, files that
contradict one another."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conversations import trained, with_lowest_spaces

from llama2.errors import UserError
from llama2.terminal_text import say_once
from llama2.tokenizer import Tokenizer, sentencepiece_model
from llama2.tokenizer.directory import find_tokenizer

TEXTS = [
    "",
    "the old mill",
    "Two  spaces.   Three",
    "\tx = 1\n        return x",
    "été 🙂 日本",
    "</s><s>",
    "<0x41>",
]
METASPACE = {
    "type": "Metaspace",
    "replacement": "\u2581",
    "prepend_scheme": "always",
    "split": False,
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return with_lowest_spaces(trained(tmp_path_factory.mktemp("trained")))


@pytest.fixture
def directory(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    """All files of a tokenizer."""
    tokenizer.save(tmp_path / "theirs")
    return tmp_path / "theirs"


@pytest.fixture
def alone(directory: Path) -> Path:
    """A directory as transformers 5 leaves it."""
    for name in ("tokenizer.model", "special_tokens_map.json"):
        (directory / name).unlink()

    (directory / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<s>", "eos_token": "</s>"})
    )
    return directory


def change(file: Path, **values: Any) -> None:
    """Set keys of a JSON file, those of its model with `model_` in front; None takes one out."""
    content = json.loads(file.read_bytes()) if file.exists() else {}
    for key, value in values.items():
        place = content["model"] if key.startswith("model_") else content
        place[key.removeprefix("model_")] = value

    file.write_text(json.dumps(content))


# --- tokenizer.json alone ---
def test_a_model_is_built_of_it(alone: Path, tokenizer: Tokenizer) -> None:
    for place in (alone, alone / "tokenizer.json"):
        again = Tokenizer.load(place)
        assert again.is_same(tokenizer)
        assert not again.is_same(
            Tokenizer(
                sentencepiece_model.pad(
                    tokenizer.model, tokenizer.vocab_size, tokenizer.vocab_size + 1
                )
            )
        )

        for text in TEXTS:
            assert again.encode(text) == tokenizer.encode(text)
            assert again.decode(again.encode(text)) == text


@pytest.mark.parametrize(
    "pipeline",
    [
        {"normalizer": None, "pre_tokenizer": METASPACE},
        {"normalizer": None, "pre_tokenizer": {**METASPACE, "prepend_scheme": "first"}},
        {
            "normalizer": {
                "type": "Sequence",
                "normalizers": [
                    {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
                    {"type": "Prepend", "prepend": "\u2581"},
                ],
            }
        },
    ],
)
def test_it_may_say_where_spaces_go_in_other_words(
    alone: Path, tokenizer: Tokenizer, pipeline: dict[str, Any]
) -> None:
    change(alone / "tokenizer.json", **pipeline)
    assert all(Tokenizer.load(alone).encode(text) == tokenizer.encode(text) for text in TEXTS)


def test_merges_may_be_pairs(alone: Path, tokenizer: Tokenizer) -> None:
    found = json.loads((alone / "tokenizer.json").read_bytes())["model"]["merges"]
    change(alone / "tokenizer.json", model_merges=[merge.split(" ") for merge in found])
    assert all(Tokenizer.load(alone).encode(text) == tokenizer.encode(text) for text in TEXTS)


def test_padding_comes_back_as_padding(tmp_path: Path, tokenizer: Tokenizer) -> None:
    size = tokenizer.vocab_size
    Tokenizer(sentencepiece_model.pad(tokenizer.model, size, size + 3)).save(tmp_path)
    (tmp_path / "tokenizer.model").unlink()
    again = Tokenizer.load(tmp_path)
    assert again.vocab_size == size + 3
    assert again.controls == {"<s>": 1, "</s>": 2}
    assert again.bytes_of(size + 1) == b""
    assert again.encode(f"[PAD{size}]") == tokenizer.encode(f"[PAD{size}]")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "ByteLevel"}]}},
            "byte_fallback is True, which no byte-level BPE has",
        ),
        (
            {"decoder": {"type": "ByteLevel"}, "model_byte_fallback": False},
            "its decoder reads bytes, and no step before makes them of a text",
        ),
        (
            {"model_type": "Unigram"},
            "the tokenizer is a Unigram model; only those of Llama 2's kind",
        ),
        ({"model_byte_fallback": False}, "without bytes for unknown characters"),
        (
            {"normalizer": {"type": "NFKC"}},
            "another way than Llama 2's tokenizer \\(normalizer 'NFKC', pre_tokenizer none",
        ),
        (
            {"normalizer": {"type": "Lowercase"}, "pre_tokenizer": METASPACE},
            "another way than Llama 2's",
        ),
        (
            {"normalizer": None, "pre_tokenizer": {**METASPACE, "split": True}},
            "another way than Llama 2's",
        ),
        (
            {"normalizer": None, "pre_tokenizer": {**METASPACE, "prepend_scheme": "never"}},
            "puts no space in front",
        ),
        ({"model_merges": [["a"]]}, "merge 1 is no pair of items"),
        ({"model_merges": ["a \u0416\u0416"]}, "merge 1 is no pair of items"),
        ({"model_merges": 3}, "merges is no list"),
        ({"model_merges": []}, "its merges are not those of a SentencePiece model"),
        ({"model_vocab": {"a": 0, "b": 0}}, "or an id stands there twice"),
        ({"model_vocab": {"\ud800": 0}}, "half of a surrogate pair"),
        ({"model_vocab": {"a": -1}}, "-1 is no id of a token"),
        ({"model_vocab": {"a": 0.5}}, "0.5 is no id of a token"),
        ({"model_vocab": {}}, "its vocabulary is empty"),
        ({"model": 7}, "model is 7; a JSON object was expected"),
        ({"added_tokens": [{"id": 1 << 40, "content": "<x>"}]}, "an added token has id"),
        (
            {"added_tokens": [{"id": 300, "content": "<x>"}]},
            "id 300 is .* in its vocabulary and '<x>' among the added",
        ),
        ({"added_tokens": [{"id": 300}]}, "an added token is"),
    ],
)
def test_what_is_none_of_ours_is_refused_by_name(
    alone: Path, values: dict[str, Any], message: str
) -> None:
    change(alone / "tokenizer.json", **values)
    with pytest.raises(UserError, match=message) as raised:
        Tokenizer.load(alone)

    assert str(raised.value).startswith(f"{alone}")
    assert "\n" not in str(raised.value)


def test_merges_that_sentencepiece_cannot_follow_are_refused(alone: Path) -> None:
    """As those of Hugging Face's own trainer, which lists one way to each item."""
    found = json.loads((alone / "tokenizer.json").read_bytes())["model"]["merges"]
    change(
        alone / "tokenizer.json",
        model_merges=list({merge.replace(" ", ""): merge for merge in found}.values()),
    )
    with pytest.raises(UserError, match="its merges are not those of a SentencePiece model"):
        Tokenizer.load(alone)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'{"model": ' + b"[" * 100_000])
def test_damage_is_one_line(alone: Path, content: bytes) -> None:
    (alone / "tokenizer.json").write_bytes(content)
    with pytest.raises(UserError, match=r"tokenizer\.json(: |:1: )"):
        Tokenizer.load(alone)


# --- added tokens ---
def test_special_ones_are_control_items_and_others_are_found_in_text(
    directory: Path, tokenizer: Tokenizer
) -> None:
    size = tokenizer.vocab_size
    (directory / "tokenizer.json").unlink()
    (directory / "added_tokens.json").write_text(
        json.dumps({"<|im_end|>": size, "<tool>": size + 1})
    )
    change(
        directory / "tokenizer_config.json",
        eos_token="<|im_end|>",
        added_tokens_decoder={str(size + 3): {"content": "<|im_start|>", "special": True}},
    )
    found = Tokenizer.load(directory)
    assert found.vocab_size == size + 4
    assert found.controls == {"<s>": 1, "</s>": 2, "<|im_end|>": size, "<|im_start|>": size + 3}
    assert (found.bos, found.eos) == (1, 2)

    for text in (*TEXTS, "<|im_end|>", "<|im_start|>user", f"[PAD{size + 2}]"):
        assert found.encode(text) == tokenizer.encode(text)

    assert found.encode("mill<tool>").count(size + 1) == 1
    assert found.decode([*tokenizer.encode("mill"), size, size + 1, size + 2]) == "mill<tool>"


def test_what_ends_answers_is_no_text_whatever_its_files_call_it(
    directory: Path, tokenizer: Tokenizer
) -> None:
    size = tokenizer.vocab_size
    (directory / "added_tokens.json").write_text(
        json.dumps({"<|im_end|>": size, "<|im_start|>": size + 1})
    )
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, size]}))
    found = Tokenizer.load(directory)
    assert found.controls == {"<s>": 1, "</s>": 2, "<|im_end|>": size}
    assert found.encode("mill<|im_end|>") == tokenizer.encode("mill<|im_end|>")
    assert found.stops == (2, size)


def test_they_are_kept_in_what_we_write(
    tmp_path: Path, directory: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    size = tokenizer.vocab_size
    say_once.cache_clear()
    (directory / "added_tokens.json").write_text(
        json.dumps({"<|im_end|>": size, "<tool>": size + 1})
    )
    (directory / "special_tokens_map.json").write_text(
        json.dumps({"eos_token": {"content": "<|im_end|>"}})
    )
    Tokenizer.load(directory).save(tmp_path / "ours")
    assert "puts a space behind them" in capsys.readouterr().err
    listed = json.loads((tmp_path / "ours" / "tokenizer.json").read_bytes())["added_tokens"]
    assert [(entry["id"], entry["content"], entry["special"]) for entry in listed] == [
        (0, "<unk>", True),
        (1, "<s>", True),
        (2, "</s>", True),
        (size, "<|im_end|>", True),
        (size + 1, "<tool>", False),
    ]
    (tmp_path / "ours" / "tokenizer.model").unlink()
    again = Tokenizer.load(tmp_path / "ours")
    assert again.controls == {"<s>": 1, "</s>": 2, "<|im_end|>": size}
    assert again.encode("a<tool>b").count(size + 1) == 1


def test_those_found_in_text_are_no_matter_of_merges(
    directory: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    """With both files nothing is amiss, and `tokenizer.json` alone makes the same tokenizer."""
    size = tokenizer.vocab_size
    listed = json.loads((directory / "tokenizer.json").read_bytes())["added_tokens"]
    change(
        directory / "tokenizer.json",
        added_tokens=[*listed, {"id": size, "content": "<|im_start|>"}],
    )
    (directory / "added_tokens.json").write_text(json.dumps({"<|im_start|>": size}))
    both = Tokenizer.load(directory)
    assert capsys.readouterr().err == ""

    for name in ("tokenizer.model", "added_tokens.json"):
        (directory / name).unlink()

    alone = Tokenizer.load(directory)
    assert alone.encode("<|im_start|>user\nmill") == both.encode("<|im_start|>user\nmill")
    assert alone.encode("<|im_start|>user").count(size) == 1


def test_those_that_the_model_has_no_place_for_are_left_out_aloud(
    directory: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    """A token for padding that was added without growing the model, as many published tunes have
    it."""
    size = tokenizer.vocab_size
    (directory / "added_tokens.json").write_text(json.dumps({"<pad>": size}))
    (directory / "config.json").write_text(json.dumps({"vocab_size": size}))
    assert Tokenizer.load(directory).fingerprint == tokenizer.fingerprint
    assert re.search(
        f"'<pad>' have ids beyond the model's vocabulary of {size}", capsys.readouterr().err
    )
    (directory / "config.json").unlink()  # as beside an adapter
    assert Tokenizer.load(directory).vocab_size == size + 1
    assert Tokenizer.load(directory, size).fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"added_tokens.json": {"<x>": 300}},
            r"the added tokens give id 300 to '<x>', tokenizer\.model to ",
        ),
        (
            {
                "added_tokens.json": {"<x>": 500},
                "tokenizer_config.json": {"added_tokens_decoder": {"500": {"content": "<y>"}}},
            },
            r"added_tokens\.json: id 500 is '<x>' here and '<y>' in another file",
        ),
        ({"added_tokens.json": {"<x>": "many"}}, "'many' is no id of a token"),
        ({"added_tokens.json": {"\ud800": 500}}, "half of a surrogate pair"),
        ({"added_tokens.json": {"<x>": True}}, "True is no id of a token"),
        ({"added_tokens.json": {"<x>": 1 << 40}}, "an added token has id"),
        (
            {"tokenizer_config.json": {"added_tokens_decoder": {"500": "<x>"}}},
            "an added token is '<x>'",
        ),
        (
            {"tokenizer_config.json": {"added_tokens_decoder": [1]}},
            r"added_tokens_decoder is \[1\]; a JSON object was expected",
        ),
    ],
)
def test_contradictions_are_refused(directory: Path, files: dict[str, Any], message: str) -> None:
    for name, values in files.items():
        (directory / name).write_text(json.dumps(values))

    with pytest.raises(UserError, match=message):
        Tokenizer.load(directory)


# --- both files ---
def test_files_that_disagree_are_named(
    directory: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert Tokenizer.load(directory).describe_disagreement(directory) is None
    assert capsys.readouterr().err == ""
    merges = json.loads((directory / "tokenizer.json").read_bytes())["model"]["merges"]
    first = [merge for merge in merges if not merge.strip("\u2581 ")]
    change(
        directory / "tokenizer.json",
        model_merges=[*first[::-1], *[one for one in merges if one not in first]],
    )
    assert Tokenizer.load(directory).fingerprint == tokenizer.fingerprint
    said = capsys.readouterr().err
    assert (
        f"{directory / 'tokenizer.json'} is not the tokenizer of the tokenizer.model beside it"
        in said
    )
    assert "tokenizer.model is used here" in said


def test_items_of_another_vocabulary_are_named(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = json.loads((directory / "tokenizer.json").read_bytes())["model"]["vocab"]
    values["mill"], values["a"] = values["a"], values.get("mill", len(values))
    change(directory / "tokenizer.json", model_vocab=values)
    Tokenizer.load(directory)
    assert re.search(r"item \d+, '.*', is not item \d+ there", capsys.readouterr().err)


def test_a_file_of_ours_that_only_looks_otherwise_agrees(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(directory / "tokenizer.json", normalizer=None, pre_tokenizer=METASPACE)
    Tokenizer.load(directory)
    assert capsys.readouterr().err == ""


def test_a_tokenizer_without_a_space_in_front_is_refused(
    directory: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    change(
        directory / "tokenizer.json",
        normalizer={"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
    )
    Tokenizer.load(directory)
    assert "it puts no space in front of a text" in capsys.readouterr().err
    change(directory / "tokenizer_config.json", add_prefix_space=False)

    with pytest.raises(
        UserError, match=r"tokenizer_config\.json: add_prefix_space is false.*--tokenizer "
    ):
        Tokenizer.load(directory)

    assert Tokenizer.load(directory / "tokenizer.model").is_same(tokenizer)


def test_a_directory_with_neither(tmp_path: Path, one_line: Callable[..., str]) -> None:
    assert find_tokenizer(tmp_path) is None
    with pytest.raises(
        UserError,
        match=r"tokenizer\.model: no such file or directory, and no tokenizer\.json either",
    ):
        Tokenizer.load(tmp_path)
