"""Byte-level tokenizers: what decides their ids, what is refused, and how they travel between
formats."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from byte_level import CHATML, FAMILIES, list_texts, write_tokenizer
from commands import llama2
from sources import SHAPE, model_of

from llama2.data.compress import spell_targets
from llama2.data.pack import Segment
from llama2.data.shards import write_shards
from llama2.errors import UserError
from llama2.formats import checkpoint, gguf_bpe, gguf_header
from llama2.formats import gguf as ours
from llama2.generate.grammar import json_grammar
from llama2.records import Document
from llama2.tokenizer import Tokenizer
from llama2.tokenizer.byte_level import spell

TEXTS = list_texts(600, seed=1)
SIZE = 720  # more than any of the tokenizers has


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A directory with a tokenizer of a family, not to be written to."""
    root = tmp_path_factory.mktemp("trained")

    def make(family: str, ordinary: bool = False) -> Path:
        path = root / f"{family}-{ordinary}"
        return path if path.exists() else write_tokenizer(path, family, ordinary=ordinary)

    return make


@pytest.fixture
def directory(tmp_path: Path, trained: Callable[..., Path]) -> Path:
    """A copy of SmolLM2's kind."""
    return shutil.copytree(trained("smollm", True), tmp_path / "theirs")


def add_model(directory: Path, size: int = SIZE) -> Path:
    """Put random weights beside a tokenizer."""
    tokenizer = Tokenizer.load(directory)
    shape = replace(
        SHAPE, vocab_size=size, bos_token_id=tokenizer.bos, eos_token_id=tokenizer.stops
    )
    checkpoint.save(model_of(shape), directory)
    return directory


def change(file: Path, **values: Any) -> None:
    """Change keys of a JSON file; `model_x` is a key of the section `model`."""
    content = json.loads(file.read_bytes())
    for key, value in values.items():
        section = content["model"] if key.startswith("model_") else content
        section[key.removeprefix("model_")] = value

    file.write_text(json.dumps(content))


# --- what a tokenizer says of itself ---
@pytest.mark.parametrize(
    ("family", "bos", "adds"),
    [
        ("smollm", "<|im_start|>", False),
        ("llama-bpe", "<|begin_of_text|>", True),
        ("qwen2", "<|im_end|>", False),  # it has none, so EOS stands in its place
    ],
)
def test_roles(trained: Callable[..., Path], family: str, bos: str, adds: bool) -> None:
    tokenizer = Tokenizer.load(trained(family))
    assert tokenizer.name_of(tokenizer.bos) == bos
    assert tokenizer.name_of(tokenizer.eos) == "<|im_end|>"
    assert tokenizer.stops == (tokenizer.eos,)
    assert (tokenizer.adds_bos, tokenizer.is_byte_level) == (adds, True)
    assert tokenizer.template == CHATML
    start = [tokenizer.bos] if adds else []
    assert tokenizer.encode_raw("a") == [*start, *tokenizer.encode("a")]
    assert tokenizer.encode_raw("") == [tokenizer.document_start]
    assert tokenizer.document_start == (tokenizer.bos if adds else tokenizer.eos)


def test_every_end_stops(directory: Path) -> None:
    names = Tokenizer.load(directory).controls
    end, other = names["<|im_end|>"], names["<|endoftext|>"]
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [other, end]}))
    assert Tokenizer.load(directory).stops == (end, other)


@pytest.mark.parametrize("setting", [True, False])
def test_whether_bos_is_added_is_written_for_every_program(
    tmp_path: Path, directory: Path, setting: bool
) -> None:
    """transformers 4 goes by the post-processor, transformers 5 by the setting."""
    transformers = pytest.importorskip("transformers")
    change(directory / "tokenizer_config.json", add_bos_token=setting)
    tokenizer = Tokenizer.load(directory)
    assert tokenizer.adds_bos is setting
    tokenizer.save(tmp_path / "ours")
    processor = json.loads((tmp_path / "ours" / "tokenizer.json").read_bytes())["post_processor"]
    assert (processor is not None) is setting
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert theirs("a b")["input_ids"] == tokenizer.encode_raw("a b")
    assert Tokenizer.load(tmp_path / "ours").adds_bos is setting


def test_a_mark_of_the_template_is_a_control_and_is_shown(directory: Path) -> None:
    """No text spells it, and what a model says is not hidden."""
    tokenizer = Tokenizer.load(directory)
    assert "<tool_call>" not in tokenizer.controls
    (mark,) = tokenizer.encode("<tool_call>")

    marked = tokenizer.with_chat_template(
        CHATML + "{{ '<tool_call>' if tools }}\t\t\t\thello there"
    )
    assert marked.controls == tokenizer.controls | {"<tool_call>": mark}
    assert mark not in marked.encode("<tool_call>")
    assert marked.decode(marked.encode("a <tool_call>")) == "a <tool_call>"
    assert marked.decode([mark]) == "<tool_call>"
    assert marked.encode("hello there\t\t\t\t") == tokenizer.encode("hello there\t\t\t\t")
    assert marked.fingerprint == tokenizer.fingerprint
    assert marked.with_chat_template(CHATML).encode("<tool_call>") == [mark]


@pytest.mark.parametrize(
    "values",
    [
        {"model_ignore_merges": True},
        {"normalizer": {"type": "NFC"}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}},
        {"added_tokens": []},
    ],
)
def test_the_fingerprint_is_of_what_decides_ids(directory: Path, values: dict[str, Any]) -> None:
    before = Tokenizer.load(directory)
    change(directory / "tokenizer.json", post_processor=None, padding=None, truncation=None)
    change(directory / "tokenizer_config.json", padding_side="left", chat_template="x")
    assert Tokenizer.load(directory).is_same(before)
    merges = json.loads((directory / "tokenizer.json").read_bytes())["model"]["merges"]
    change(directory / "tokenizer.json", model_merges=[" ".join(merge) for merge in merges])
    assert Tokenizer.load(directory).fingerprint == before.fingerprint
    change(directory / "tokenizer.json", **values)
    assert Tokenizer.load(directory).fingerprint != before.fingerprint


def test_a_file_that_cuts_and_pads_is_written_without(directory: Path, tmp_path: Path) -> None:
    change(
        directory / "tokenizer.json",
        truncation={
            "direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0,
        },
        padding={
            "strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": None,
            "pad_id": 1, "pad_type_id": 0, "pad_token": "<|im_end|>",
        },
    )  # fmt: skip
    tokenizer = Tokenizer.load(directory)
    assert len(tokenizer.encode("the river runs past the old mill, again and again")) > 8
    tokenizer.save(tmp_path / "ours")
    written = json.loads((tmp_path / "ours" / "tokenizer.json").read_bytes())
    assert written["truncation"] is None
    assert written["padding"] is None


def test_tokens_that_other_files_add_are_written_into_it(directory: Path, tmp_path: Path) -> None:
    size = Tokenizer.load(directory).vocab_size
    entry = {"content": "<|late|>", "special": True, "normalized": False}
    change(directory / "tokenizer_config.json", added_tokens_decoder={str(size): entry})
    tokenizer = Tokenizer.load(directory)
    assert tokenizer.controls["<|late|>"] == size
    assert size not in tokenizer.encode("<|late|>")
    tokenizer.save(tmp_path / "ours")
    assert Tokenizer.load(tmp_path / "ours").controls == tokenizer.controls


def test_bytes_of_every_item(trained: Callable[..., Path]) -> None:
    tokenizer = Tokenizer.load(trained("qwen2"))
    alphabet = {bytes([byte]) for byte in range(256)}
    items = [tokenizer.bytes_of(token) for token in range(tokenizer.vocab_size)]
    assert alphabet <= set(items)
    assert all(tokenizer.bytes_of(token) == b"" for token in tokenizer.controls.values())
    assert spell("Ġthe") == b" the"
    assert spell("ĠĊĀ") == b" \n\x00"
    assert spell("a b") == b"a b"  # a space stands for no byte, so this is a text


# --- what is refused ---
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "Unigram"}, "a byte-level Unigram model, no BPE"),
        ({"model_byte_fallback": True}, "byte_fallback is True"),
        ({"model_end_of_word_suffix": "</w>"}, "end_of_word_suffix is '</w>'"),
        ({"decoder": None}, "its decoder does not read them .decoder None"),
        ({"decoder": {"type": "Fuse"}}, "its decoder does not read them .decoder 'Fuse'"),
        ({"model_vocab": {}}, "its vocabulary is empty"),
        ({"model_vocab": {"a": 1, "b": 1}}, "an id stands there twice"),
        ({"model_vocab": {"a": "1"}}, "'1' is no id of a token"),
        ({"model_vocab": {"\ud800": 1}}, "half of a surrogate pair"),
        ({"model_vocab": ["a"]}, "vocab is .*a JSON object was expected"),
        ({"model_merges": [["a"]]}, "merge 1 is no pair of items"),
        ({"model_merges": [7]}, "merge 1 is no pair of items"),
        ({"model_merges": ["a \u0416"]}, "merge 1 is no pair of items"),
        ({"pre_tokenizer": {"type": "Nothing"}, "normalizer": {"type": "ByteLevel"}}, "damaged"),
        ({"added_tokens": [{"id": 5000, "content": "<|far|>"}]}, "do not follow the vocabulary"),
        ({"added_tokens": [{"id": 5}]}, "an added token is"),
        ({"added_tokens": [{"id": 300, "content": "<x>"}]}, "do not follow the vocabulary"),
    ],
)
def test_damaged_files_are_refused_by_name(
    directory: Path, values: dict[str, Any], message: str
) -> None:
    change(directory / "tokenizer.json", **values)
    with pytest.raises(UserError, match=message) as raised:
        Tokenizer.load(directory)

    assert str(raised.value).startswith(f"{directory}")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eos_token": None}, "no id ends a text"),
        ({"eos_token": "<|none|>"}, "eos_token is '<|none|>', which is no item"),
        ({"bos_token": "<|none|>"}, "bos_token is '<|none|>', which is no item"),
        ({"eos_token": "a"}, "is an ordinary item of the vocabulary"),
    ],
)
def test_roles_that_cannot_be_are_refused(
    directory: Path, settings: dict[str, Any], message: str
) -> None:
    change(directory / "tokenizer_config.json", **settings)
    with pytest.raises(UserError, match=message.replace("|", "\\|")):
        Tokenizer.load(directory)


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb"])
def test_halves_of_characters_are_refused(trained: Callable[..., Path], text: str) -> None:
    tokenizer = Tokenizer.load(trained("qwen2"))
    with pytest.raises(UserError, match="half of a surrogate pair"):
        tokenizer.encode(text)

    with pytest.raises(UserError, match="half of a surrogate pair"):
        tokenizer.encode_many(["a", text, "b"] * 40, 2)


def test_without_the_library_the_line_that_installs_it_is_named(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match=r"'tokenizers', .*pip install 'llama2\[bpe\]'"):
        Tokenizer.load(directory)


def test_tiktoken_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_text("IQ== 0\nIg== 1\nIw== 2\n")
    with pytest.raises(UserError, match=r"tiktoken.*tokenizer\.json"):
        Tokenizer.load(tmp_path)

    with pytest.raises(UserError, match=r"tiktoken.*tokenizer\.json"):
        Tokenizer.load(tmp_path / "tokenizer.model")


def test_beside_tiktoken_tokenizer_json_is_taken(directory: Path) -> None:
    before = Tokenizer.load(directory)
    (directory / "tokenizer.model").write_text("IQ== 0\nIg== 1\nIw== 2\n")
    assert Tokenizer.load(directory).is_same(before)


# --- between formats ---
@pytest.mark.parametrize("family", FAMILIES)
def test_through_hugging_face_and_gguf(
    tmp_path: Path,
    trained: Callable[..., Path],
    family: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    theirs = add_model(shutil.copytree(trained(family), tmp_path / "theirs"))
    original = Tokenizer.load(theirs)
    assert original.vocab_size == SIZE
    assert llama2("import", theirs, "--out", tmp_path / "imported") == 0
    assert "the tokenizer has 720 pieces, as the model" in capsys.readouterr().err
    file, again = tmp_path / "model.gguf", tmp_path / "again"
    assert llama2("export", tmp_path / "imported", "--to", "gguf", "--out", file) == 0
    assert llama2("import", file, "--out", again) == 0
    assert llama2("export", again, "--to", "hf", "--out", tmp_path / "hf") == 0
    assert llama2("verify", theirs, tmp_path / "hf") == 0
    assert llama2("verify", theirs, file) == 0

    for place in (tmp_path / "imported", file, again, tmp_path / "hf"):
        tokenizer = checkpoint.load_tokenizer(place)
        assert tokenizer.encode_many(TEXTS) == original.encode_many(TEXTS)
        for attribute in ("bos", "eos", "stops", "adds_bos", "controls", "template", "fingerprint"):
            assert getattr(tokenizer, attribute) == getattr(original, attribute), attribute

    copied = (tmp_path / "imported" / "tokenizer.json").read_bytes()
    assert copied == (theirs / "tokenizer.json").read_bytes()


def test_gguf_says_what_llama_cpp_needs(tmp_path: Path, trained: Callable[..., Path]) -> None:
    theirs = add_model(shutil.copytree(trained("llama-bpe", True), tmp_path / "theirs"))
    assert llama2("export", theirs, "--to", "gguf", "--out", tmp_path / "model.gguf") == 0
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    values = {key: field.contents() for key, field in fields.items() if "tokenizer" in key}
    tokenizer = Tokenizer.load(theirs)
    expected = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.bos_token_id": tokenizer.bos,
        "tokenizer.ggml.eos_token_id": tokenizer.eos,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_space_prefix": False,
    }
    assert {key: values.get(key) for key in expected} == expected
    kinds, tokens = values["tokenizer.ggml.token_type"], values["tokenizer.ggml.tokens"]
    assert len(kinds) == len(tokens) == SIZE
    assert {tokens[token] for token in range(SIZE) if kinds[token] == 3} == {*tokenizer.controls}
    typed = {"<tool_call>", "hello there", "<left>", "<right>", "mill", "\t\t\t\t"}
    assert {tokens[token] for token in range(SIZE) if kinds[token] == 4} == typed
    assert tokens[-1] == f"[PAD{SIZE - 1}]"
    assert kinds[-1] == 5


def test_ways_to_divide_texts_without_a_name_stay_out_of_gguf(
    tmp_path: Path, directory: Path, one_line: Callable[..., str]
) -> None:
    add_model(directory)
    split = {"type": "Split", "pattern": {"Regex": "x"}, "behavior": "Isolated", "invert": False}
    plain = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    change(
        directory / "tokenizer.json",
        pre_tokenizer={"type": "Sequence", "pretokenizers": [split, plain]},
    )
    said = one_line("export", directory, "--to", "gguf", "--out", tmp_path / "model.gguf")
    assert "llama.cpp has no name for the way in which this tokenizer divides texts" in said
    assert not (tmp_path / "model.gguf").exists()


@pytest.mark.parametrize("form", ["meta", "llama2c"])
def test_formats_without_a_place_for_it_refuse_it(
    tmp_path: Path, directory: Path, form: str, one_line: Callable[..., str]
) -> None:
    add_model(directory)
    said = one_line("export", directory, "--to", form, "--out", tmp_path / "out.bin")
    assert "a byte-level BPE tokenizer" in said
    assert not (tmp_path / "out.bin").exists()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("pre", "tekken", "divides texts in the way 'tekken' .*--tokenizer FILE"),
        ("pre", 7, "divides texts in the way 7 "),
        ("tokens", ["a"] * 719, "do not both have 720 items"),
        ("tokens", ["a"] * 720, "damaged"),
        ("merges", ["a"], "merge 1 is no pair"),
        ("eos_token_id", 100_000, "damaged|exceeds|below"),
    ],
)
def test_a_damaged_vocabulary_of_gguf_names_the_file(
    tmp_path: Path, directory: Path, key: str, value: Any, message: str
) -> None:
    add_model(directory)
    file = tmp_path / "model.gguf"
    assert llama2("export", directory, "--to", "gguf", "--out", file) == 0
    stored = ours.read(file)
    assert stored.tokenizer is not None
    header = gguf_header.read_header(file)
    metadata = header.metadata | {f"tokenizer.ggml.{key}": value}
    with pytest.raises(UserError, match=message) as raised:
        gguf_bpe.build_model(file, metadata, stored.config)

    assert str(raised.value).startswith(str(file))


def test_a_tokenizer_with_more_items_than_embeddings_is_refused(
    tmp_path: Path, directory: Path, one_line: Callable[..., str]
) -> None:
    add_model(directory, 600)
    said = one_line("import", directory, "--out", tmp_path / "ours")
    assert "pieces, the model 600" in said
    assert not (tmp_path / "ours").exists()


def test_added_tokens_beyond_the_embeddings_are_left_out(
    tmp_path: Path, trained: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = shutil.copytree(trained("smollm", True), tmp_path / "theirs")
    size = Tokenizer.load(theirs).vocab_size
    add_model(theirs, size - 1)
    assert llama2("import", theirs, "--out", tmp_path / "ours") == 0
    assert "'<|pause|>' have ids beyond the model's vocabulary" in capsys.readouterr().err
    names = [
        entry["content"]
        for entry in json.loads((tmp_path / "ours" / "tokenizer.json").read_bytes())["added_tokens"]
    ]
    assert "<|pause|>" not in names
    assert Tokenizer.load(tmp_path / "ours").vocab_size == size - 1


# --- what goes by the tokenizer ---
@pytest.mark.parametrize("family", FAMILIES)
def test_json_can_be_held_to_a_schema(trained: Callable[..., Path], family: str) -> None:
    pytest.importorskip("llguidance")
    plain = Tokenizer.load(trained(family))
    tokenizer = plain.pad(SIZE)
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    grammar = json_grammar(tokenizer, schema)
    for token in [*tokenizer.encode('{"name": "Ann", "age": 31}'), tokenizer.eos]:
        allowed = set(grammar.mask().nonzero().flatten().tolist())
        assert token in allowed
        assert not (allowed - {tokenizer.eos}) & set(tokenizer.controls.values())
        assert max(allowed) < plain.vocab_size
        grammar.accept(token)

    assert grammar.done
    assert grammar.mask().nonzero().flatten().tolist() == [tokenizer.eos]


@pytest.mark.parametrize("family", FAMILIES)
def test_documents_are_separated(tmp_path: Path, trained: Callable[..., Path], family: str) -> None:
    """By BOS where texts begin with it, else by EOS; and what is predicted spells the text."""
    tokenizer = Tokenizer.load(trained(family))
    texts = ["the old mill", " a b\n", "日本語"]
    documents = [Document(text) for text in texts]
    shards = write_shards(documents, tokenizer, tmp_path / "shards", threads=2)
    start = tokenizer.bos if family == "llama-bpe" else tokenizer.eos
    for number, text in enumerate(texts):
        ids = shards.document(number).astype(np.int64)
        assert ids.tolist() == [start, *tokenizer.encode(text), tokenizer.eos]
        assert spell_targets(Segment(ids, ids >= 0), tokenizer) == text.encode()
