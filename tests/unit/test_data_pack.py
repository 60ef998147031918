"""Shards on disk, and packing: every target exactly once, no segment beyond its row, positions that
restart."""

import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama2.data.mix import mix_passes
from llama2.data.pack import Segment, TextRows, collate, cut_segment, fill_bins, pack
from llama2.data.shards import Shards, write_shards
from llama2.errors import UserError
from llama2.records import Document
from llama2.tokenizer import Tokenizer, train

TEXTS = [
    f"Mill number {number} stands by the river, " + "and turns " * (number % 7)
    for number in range(60)
] + [""]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train(TEXTS, 320, tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def shards(tmp_path: Path, tokenizer: Tokenizer) -> Shards:
    return write_shards(
        (Document(text) for text in TEXTS), tokenizer, tmp_path / "shards", shard_tokens=500
    )


def test_shards_hold_the_documents(shards: Shards, tokenizer: Tokenizer) -> None:
    expected = [[1, *tokenizer.encode(text), 2] for text in TEXTS]
    assert len(list(shards.directory.glob("tokens-*.bin"))) > 2
    assert [shards.document(number).tolist() for number in range(len(shards))] == expected
    assert shards.lengths_N.tolist() == [len(ids) for ids in expected]
    assert shards.tokens == sum(len(ids) for ids in expected)
    assert (shards.document(0).dtype, shards.vocab_size) == (np.dtype("uint16"), 320)

    for number in (-1, len(TEXTS)):
        with pytest.raises(IndexError):
            shards.document(number)

    Shards(shards.directory, tokenizer).verify()
    assert not list(shards.directory.glob("*.tmp"))


def test_large_vocabularies_take_four_bytes(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "vocab_size", 65_537)
    monkeypatch.setattr(tokenizer, "encode_many", lambda texts, threads: [[65_536] for _ in texts])
    shards = write_shards([Document("x")], tokenizer, tmp_path)
    assert shards.document(0).tolist() == [1, 65_536, 2]
    assert shards.document(0).dtype == np.uint32


def test_shards_refuse_what_does_not_fit(
    shards: Shards, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    with pytest.raises(UserError, match="already holds token shards"):
        write_shards([Document("x")], tokenizer, shards.directory)

    with pytest.raises(UserError, match="another tokenizer"):
        Shards(shards.directory, train(TEXTS, 321, tmp_path / "other"))

    with pytest.raises(UserError, match="no documents"):
        write_shards([], tokenizer, tmp_path / "none")

    with pytest.raises(UserError, match=r"index\.json: no such file"):
        Shards(tmp_path / "none")

    tokens, index = shards.directory / "tokens-00001.bin", shards.directory / "index.json"
    content = tokens.read_bytes()
    tokens.write_bytes(content[:-2])

    with pytest.raises(UserError, match=r"tokens-00001\.bin: \d+ bytes, expected"):
        Shards(shards.directory)

    tokens.write_bytes(content[:-2] + b"\0\0")
    with pytest.raises(UserError, match=r"tokens-00001\.bin: its checksum differs"):
        Shards(shards.directory).verify()

    for content, cause in (
        ("{", "not valid JSON"),
        ("[]", "a JSON object was expected"),
        (json.dumps({**json.loads(index.read_text()), "version": 9}), "version 9"),
    ):
        index.write_text(content)
        with pytest.raises(UserError, match=cause):
            Shards(shards.directory)


def test_an_interrupted_directory_is_written_afresh(tmp_path: Path, tokenizer: Tokenizer) -> None:
    def breaks() -> object:
        yield from (Document(text) for text in TEXTS)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(breaks(), tokenizer, tmp_path, shard_tokens=500)  # type: ignore[arg-type]

    assert not (tmp_path / "index.json").exists()
    write_shards([Document("again")], tokenizer, tmp_path)
    assert len(Shards(tmp_path, tokenizer)) == 1


@given(st.lists(st.integers(1, 20), max_size=60), st.integers(20, 40))
def test_best_fit(sizes: list[int], capacity: int) -> None:
    bins = fill_bins(sizes, capacity)
    assert sorted(index for row in bins for index in row) == list(range(len(sizes)))
    fills = [sum(sizes[index] for index in row) for row in bins]
    assert all(0 < fill <= capacity for fill in fills)
    # two half-empty bins would have been one
    assert sum(2 * fill <= capacity for fill in fills) <= 1
    firsts = [sizes[row[0]] for row in bins]
    assert firsts == sorted(firsts, reverse=True)


ITEMS = st.lists(
    st.integers(2, 30).flatmap(
        lambda size: st.tuples(
            st.lists(st.integers(3, 99), min_size=size, max_size=size),
            st.lists(st.booleans(), min_size=size, max_size=size),
        )
    ),
    min_size=1,
    max_size=20,
)


@given(items=ITEMS, length=st.integers(4, 25))
def test_packed_rows_hold_each_target_once(
    items: list[tuple[list[int], list[bool]]], length: int
) -> None:
    segments = [cut_segment(*item, length) for item in items]
    packed = pack([one for one in segments if one is not None], length)
    expected: Counter[tuple[int, ...]] = Counter()

    for (ids, mask), segment in zip(items, segments, strict=True):
        ids_kept, mask_kept = ids[: length + 1], mask[: length + 1]
        assert (segment is not None) == any(mask_kept[1:])
        if segment is not None:
            expected[tuple(zip(ids_kept, ids_kept[1:], mask_kept[1:]))] += 1  # type: ignore[arg-type]

    if not packed.rows:
        assert not expected
        return

    batch = {name: tensor.numpy() for name, tensor in collate(packed.rows, length).items()}
    read_B = batch.pop("read_B")
    assert {array.shape for array in batch.values()} == {(len(packed.rows), length)}
    assert read_B.tolist() == [sum(len(segment) for segment in row) for row in packed.rows]
    found: Counter[tuple[int, ...]] = Counter()

    for row in range(len(packed.rows)):
        numbers = batch["documents_BT"][row]
        assert (np.diff(numbers) >= 0).all()
        for number in range(len(packed.rows[row])):
            here = numbers == number
            assert batch["positions_BT"][row][here].tolist() == list(range(here.sum()))
            found[
                tuple(
                    zip(
                        batch["tokens_BT"][row][here].tolist(),
                        batch["targets_BT"][row][here].tolist(),
                        batch["weights_BT"][row][here].astype(bool).tolist(),
                    )
                )
            ] += 1  # type: ignore[arg-type]

        assert batch["weights_BT"][row][numbers == len(packed.rows[row])].sum() == 0

    assert found == expected
    assert packed.fill == pytest.approx(
        sum(len(pairs) * count for pairs, count in expected.items()) / (len(packed.rows) * length)
    )


@pytest.mark.parametrize("length", [7, 64, 5000])
def test_text_rows_are_the_stream(shards: Shards, length: int) -> None:
    mixture = mix_passes({"all": shards.lengths_N}, {"all": 2}, seed=0)
    rows = TextRows([shards], mixture.source_N, mixture.document_N, length)
    batch = {name: tensor.numpy() for name, tensor in collate(list(rows), length).items()}
    documents = [shards.document(number).tolist() for number in mixture.document_N]
    counted = batch["weights_BT"].astype(bool)
    assert counted.sum() == rows.places == sum(len(ids) - 1 for ids in documents)
    assert batch["tokens_BT"][counted].tolist() == [
        token for ids in documents for token in ids[:-1]
    ]
    assert batch["targets_BT"][counted].tolist() == [
        token for ids in documents for token in ids[1:]
    ]
    starts = counted & (batch["positions_BT"] == 0)
    assert starts.sum() == sum(len(row) for row in rows)
    assert (counted[:-1]).all()  # only the last row is padded
    assert "documents_BT" not in collate([rows[0]], separate=False)

    for row in (-1, len(rows)):
        with pytest.raises(IndexError):
            rows[row]


def test_a_row_longer_than_the_batch_is_refused() -> None:
    segment = Segment(np.arange(6), np.ones(6, bool))
    assert collate([[segment]])["tokens_BT"].shape == (1, 5)
    with pytest.raises(ValueError, match="a row of 5 places in a batch of 4"):
        collate([[segment]], 4)


def test_packing_is_dense_and_fast() -> None:
    draw = random.Random(0)
    items = [
        Segment(np.full(size, 5), np.ones(size, bool))
        for size in (draw.randint(10, 400) for _ in range(5000))
    ]
    assert pack(items, 512).fill > 0.98
