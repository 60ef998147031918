"""A list of merges does to a text what SentencePiece does by scores, and gives the scores back."""

from __future__ import annotations

import random

import pytest
from conversations import contents, trained, with_lowest_spaces

from llama2.tokenizer import Tokenizer, merges, sentencepiece_model
from llama2.tokenizer.sentencepiece_model import (
    BYTE,
    CONTROL,
    NORMAL,
    SPACE,
    UNKNOWN,
    Vocabulary,
    VocabularyItem,
)


@pytest.fixture(scope="module")
def ordinary(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return trained(tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module", params=["as trained", "lowest spaces"])
def tokenizer(request: pytest.FixtureRequest, ordinary: Tokenizer) -> Tokenizer:
    return ordinary if request.param == "as trained" else with_lowest_spaces(ordinary)


def made(texts: list[str], scores: list[float]) -> Tokenizer:
    """A tokenizer of these items behind unknown, BOS, EOS and the bytes."""
    first = [
        VocabularyItem("<unk>", 0.0, UNKNOWN),
        VocabularyItem("<s>", 0.0, CONTROL),
        VocabularyItem("</s>", 0.0, CONTROL),
    ]
    items = [VocabularyItem(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)]
    return Tokenizer(
        sentencepiece_model.build(Vocabulary([*first, *items, *map(VocabularyItem, texts, scores)]))
    )


def vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    return sentencepiece_model.parse(tokenizer.model, "here")


def test_the_merges_give_the_ids(tokenizer: Tokenizer) -> None:
    merger = merges.make_merger(vocabulary(tokenizer).items)
    draw = random.Random(0)
    for text in (contents(draw) for _ in range(1500)):
        assert merger.encode(text) == tokenizer.encode(text), text


def test_a_run_of_spaces_grows_from_the_left(ordinary: Tokenizer) -> None:
    tokenizer = with_lowest_spaces(ordinary)
    items = vocabulary(tokenizer).items
    for run in range(1, 60):
        ids = tokenizer.encode(" " * (run - 1) + "\n")[: run // 16 + bool(run % 16)]
        assert [len(items[token].text) for token in ids] == [16] * (run // 16) + [run % 16] * bool(
            run % 16
        )
        assert merges.make_merger(items).encode(" " * (run - 1) + "\n") == tokenizer.encode(
            " " * (run - 1) + "\n"
        )


def test_any_vocabulary_of_distinct_scores_gives_the_ids() -> None:
    """Items that overlap themselves in many ways, in any order."""
    draw = random.Random(0)
    for _ in range(300):
        texts = {SPACE, "a", "b", "c"}
        while len(texts) < 12:
            texts.add("".join(draw.choices(sorted(texts - {SPACE}), k=2))[:8])

        ordered = draw.sample(sorted(texts), len(texts))
        tokenizer = made(ordered, [-float(rank) for rank in range(len(texts))])
        merger = merges.make_merger(vocabulary(tokenizer).items)

        for _ in range(40):
            text = "".join(draw.choices("abc"[: draw.randint(1, 3)], k=draw.randint(1, 14)))
            assert merger.encode(text) == tokenizer.encode(text), (text, ordered)


def test_scores_come_back(tokenizer: Tokenizer) -> None:
    items = vocabulary(tokenizer).items
    texts = {item.text: token for token, item in enumerate(items) if item.kind == NORMAL}
    scores = merges.score_items(texts, merges.list_merges(items))
    assert scores is not None
    assert {text: scores[text] for text in texts if len(text) > 1} == {
        item.text: item.score for item in items if item.kind == NORMAL and len(item.text) > 1
    }


def test_merges_that_leave_a_way_out_have_no_scores(ordinary: Tokenizer) -> None:
    items = vocabulary(ordinary).items
    texts = {item.text: token for token, item in enumerate(items) if item.kind == NORMAL}
    found = merges.list_merges(items)
    assert merges.score_items(texts, found[:-1]) is None
    assert merges.score_items(texts, [*found, found[0]]) is None


def test_characters_outside_become_bytes(ordinary: Tokenizer) -> None:
    merger = merges.make_merger(vocabulary(ordinary).items)
    assert merger.encode("🙂")[-4:] == [3 + byte for byte in "🙂".encode()]
    assert merger.encode("") == ordinary.encode("") == []
    assert merger.encode(SPACE) == ordinary.encode(SPACE)
