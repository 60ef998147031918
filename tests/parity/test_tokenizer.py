"""The tokenizer against SentencePiece and transformers, and what no text may ever do to it."""

import io
import random
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, LlamaTokenizer

from llama2.errors import UserError
from llama2.tokenizer import Tokenizer, train

WORDS = [
    "the",
    "river",
    "runs",
    "slowly",
    "past",
    "old",
    "mill",
    "and",
    "miller",
    "counts",
    "sacks",
    "of",
    "flour",
]


def corpus(size: int = 400, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [
        " ".join(draw.choices(WORDS, k=20)).capitalize()
        + f" in {draw.randint(1000, 2030)}.\n    indented, été [INST]"
        for _ in range(size)
    ]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    train(corpus(), 400, path)
    return path


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Tokenizer:
    return Tokenizer.load(directory)


STRINGS = [
    "Hello, the river",
    "a\nb\n\n  c",
    "x ",
    "",
    "日本語 été 🙂",
    "year 1987, 3.14",
    "[INST] hi [/INST]",
    "tab\there",
    "<0x41>",
    ". . .",
    "the    old    mill   ",
    "<<SYS>>\nx\n<</SYS>>",
    "\x00\x7f",
    "ﬁ ½ Å",
]


def test_properties_of_the_paper(tokenizer: Tokenizer) -> None:
    assert (tokenizer.vocab_size, tokenizer.bos, tokenizer.eos) == (400, 1, 2)
    digits = [tokenizer.decode([token]) for token in tokenizer.encode("1987")]
    assert [part for part in digits if part] == ["1", "9", "8", "7"]
    assert tokenizer.encode("\n")[-1] == 3 + 10  # byte items follow the three control items
    assert tokenizer.encode("🙂")[-4:] == [3 + byte for byte in "🙂".encode()]


@pytest.mark.parametrize("text", STRINGS)
def test_transformers_reads_the_saved_directory(
    directory: Path, tokenizer: Tokenizer, text: str
) -> None:
    for theirs in (
        AutoTokenizer.from_pretrained(directory),
        LlamaTokenizer.from_pretrained(directory),
    ):
        assert theirs.encode(text, add_special_tokens=False) == tokenizer.encode(text)
        assert theirs.encode(text) == [tokenizer.bos, *tokenizer.encode(text)]
        assert (theirs.bos_token_id, theirs.eos_token_id, theirs.legacy) == (1, 2, True)


def test_where_transformers_differs(directory: Path, tokenizer: Tokenizer) -> None:
    """transformers takes control ids out of text, and one of two leading spaces; SentencePiece does
    neither."""
    theirs = LlamaTokenizer.from_pretrained(directory)
    assert theirs.encode("</s>", add_special_tokens=False) == [2]
    assert 2 not in tokenizer.encode("</s>")
    assert (
        theirs.encode(" x", add_special_tokens=False)
        == tokenizer.encode("x")
        != tokenizer.encode(" x")
    )


MARKS = st.sampled_from(
    ["</s>", "<s>", "<unk>", "[INST]", "[/INST]", "<<SYS>>", "\u2581", "<0x02>", "\n", " ", "\x00"]
)


@settings(deadline=None, max_examples=300)
@given(parts=st.lists(st.one_of(MARKS, st.text(max_size=6)), max_size=8))
def test_no_text_becomes_a_control_id_and_all_text_survives(
    tokenizer: Tokenizer, parts: list[str]
) -> None:
    text = "".join(parts)
    ids = tokenizer.encode(text)
    assert min(ids, default=3) > 2
    # SentencePiece's own sign for a space
    assert tokenizer.decode(ids) == text.replace("\u2581", " ")
    assert "".join(tokenizer.stream(ids)) == tokenizer.decode(ids)


def test_half_of_a_surrogate_pair_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(
        UserError, match=r"the text 'ab\\ud800c' holds half of a surrogate pair at character 3"
    ):
        tokenizer.encode_many(["whole", "ab\ud800c"])


def test_streams_whole_characters(tokenizer: Tokenizer) -> None:
    parts = list(tokenizer.stream(tokenizer.encode("a🙂b")))
    assert "".join(parts) == "a🙂b"
    assert "🙂" in parts
    assert tokenizer.decode([3 + 0xF0, 3 + 0x9F]) == "\ufffd"
    assert tokenizer.decode([1, *tokenizer.encode("mill"), 2]) == "mill"


def test_agrees_with_sentencepiece(directory: Path, tokenizer: Tokenizer) -> None:
    raw = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    assert tokenizer.encode_many(STRINGS, threads=2) == [raw.encode(text) for text in STRINGS]
    assert all(
        tokenizer.decode(raw.encode(text)) == raw.decode(raw.encode(text)) for text in STRINGS
    )


@settings(deadline=None, max_examples=100)
@given(
    parts=st.lists(
        st.one_of(
            MARKS, st.sampled_from(["the", "mill ", " 1987", "  old", "."]), st.text(max_size=3)
        ),
        min_size=1,
        max_size=30,
    ),
    part=st.integers(1, 12),
)
def test_long_texts_in_parts_have_the_ids_of_the_whole(
    directory: Path, tokenizer: Tokenizer, parts: list[str], part: int
) -> None:
    raw = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    text = "".join(parts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llama2.tokenizer.sentencepiece_codec._PART", part)
        assert tokenizer.encode(text) == raw.encode(text)

    book = (text + "the mill by the river ") * 600
    assert tokenizer.encode(book) == raw.encode(book)


def test_training_is_deterministic_and_bounded(tmp_path: Path) -> None:
    first = train(corpus(), 350, tmp_path / "a", sample_bytes=8000, seed=3)
    again = train(iter(corpus()), 350, tmp_path / "b", sample_bytes=8000, seed=3)
    other = train(corpus(), 350, tmp_path / "c", sample_bytes=8000, seed=4)
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert Tokenizer.load(tmp_path / "a" / "tokenizer.model").fingerprint == first.fingerprint
    assert not list(tmp_path.rglob("*.tmp"))


def test_long_lines_are_not_lost(tmp_path: Path) -> None:
    long = " ".join(["supercalifragilistic"] * 1000)
    tokenizer = train([long + "é" * 5000], 300, tmp_path)
    assert len(tokenizer.encode("supercalifragilistic")) < 8


@pytest.mark.parametrize(
    ("texts", "size", "cause"),
    [
        (["one two"], 5000, "too large for this text, which supports 2"),
        (["one two"], 200, "leaves no room"),
        (["abcdefghijklmnopqrstuvwxyz"], 265, "too small"),
        ([], 400, "no text"),
        (["\n", ""], 400, "no text"),
    ],
)
def test_training_errors(tmp_path: Path, texts: list[str], size: int, cause: str) -> None:
    with pytest.raises(UserError, match=cause):
        train(texts, size, tmp_path)

    assert not list(tmp_path.iterdir())


def foreign(path: Path, **options: object) -> Path:
    model = io.BytesIO()
    settings = {
        "model_type": "bpe",
        "vocab_size": 320,
        "byte_fallback": True,
        "minloglevel": 2,
        **options,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus(50)), model_writer=model, **settings
    )
    path.write_bytes(model.getvalue())

    return path


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({"model_type": "unigram"}, "not a BPE model"),
        ({"bos_id": -1}, "have ids"),
        ({"byte_fallback": False, "vocab_size": 60}, "no byte fallback"),
        ({"add_dummy_prefix": False}, "no space in front"),
        ({"split_by_whitespace": False, "vocab_size": 600}, "runs across a space"),
    ],
)
def test_models_that_do_not_fit_are_refused(
    tmp_path: Path, options: dict[str, object], cause: str
) -> None:
    with pytest.raises(UserError, match=cause):
        Tokenizer.load(foreign(tmp_path / "x.model", **options))


def test_other_options_are_accepted(tmp_path: Path) -> None:
    assert (
        Tokenizer.load(foreign(tmp_path / "x.model", normalization_rule_name="nmt_nfkc")).vocab_size
        == 320
    )


def test_files_that_are_not_models(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"no model")
    with pytest.raises(UserError, match="not a SentencePiece model"):
        Tokenizer.load(tmp_path)

    with pytest.raises(UserError, match="no such file"):
        Tokenizer.load(tmp_path / "missing")
