"""The loader gives the same optimizer steps whatever the ranks, the micro-batches and the
interruptions."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llama2.batches import Batch, count_tokens
from llama2.data.loader import Rows
from llama2.data.pack import Segment, collate, pack
from llama2.errors import UserError
from llama2.model.llama import Llama, LlamaConfig
from llama2.ranks import Axis, Ranks
from llama2.train.objectives import next_token


def numbers(items: Sequence[int]) -> Batch:
    return {"tokens_B": torch.tensor(items), "weights_B": torch.ones(len(items))}


def counted(batches: list[Batch]) -> list[int]:
    return [int(token) for batch in batches for token in batch["tokens_B"][batch["weights_B"] > 0]]


def member(rank: int, size: int) -> Ranks:
    """One of several ranks that never talk."""
    return Ranks(torch.device("cpu"), rank, size, replicate=Axis(size, rank))


def rows(count: int, **options: Any) -> Rows[int]:
    settings = {"ranks": Ranks.alone(), "batch_size": 6, "micro_batch_size": 2, "seed": 3}
    return Rows(range(count), numbers, **{**settings, **options})


PLANS = {
    "count": st.integers(1, 40),
    "batch": st.integers(1, 12),
    "micro": st.integers(1, 5),
    "epochs": st.integers(1, 3),
}


@given(world=st.integers(1, 5), **PLANS)
def test_ranks_and_micro_batches_share_the_same_global_batches(
    count: int, batch: int, micro: int, epochs: int, world: int
) -> None:
    whole = [
        counted(step)
        for step in rows(count, batch_size=batch, micro_batch_size=batch, epochs=epochs)
    ]
    shares = [
        list(
            rows(
                count,
                batch_size=batch,
                micro_batch_size=micro,
                epochs=epochs,
                ranks=member(rank, world),
            )
        )
        for rank in range(world)
    ]
    assert (
        {len(share) for share in shares}
        == {len(whole)}
        == {rows(count, batch_size=batch, epochs=epochs).steps}
    )

    for step, expected in enumerate(whole):
        assert sorted(token for share in shares for token in counted(share[step])) == sorted(
            expected
        )
        assert len({len(share[step]) for share in shares}) == 1
        assert all(len(part["tokens_B"]) <= micro for share in shares for part in share[step])
        assert len(shares[0][step]) == math.ceil(math.ceil(len(expected) / world) / micro)

    assert Counter(token for step in whole for token in step) == Counter(
        list(range(count)) * epochs
    )


@given(cut=st.integers(0, 20), **PLANS)
def test_resumed_equals_uninterrupted(
    count: int, batch: int, micro: int, epochs: int, cut: int
) -> None:
    options = {"batch_size": batch, "micro_batch_size": micro, "epochs": epochs}
    whole = [counted(step) for step in rows(count, **options)]
    first = rows(count, **options)
    head = [counted(step) for _, step in zip(range(cut), first)]
    second = rows(count, **options)
    second.load_state_dict(first.state_dict())
    assert head[:cut] + [counted(step) for step in second] == whole
    assert next(second, None) is None


def test_resumed_on_another_number_of_ranks() -> None:
    first = rows(20)
    head = counted(next(first))
    shares = [rows(20, ranks=member(rank, 3)) for rank in range(3)]

    for share in shares:
        share.load_state_dict(first.state_dict())

    tail = [
        sorted(token for batches in step for token in counted(batches)) for step in zip(*shares)
    ]
    assert sorted(head) not in tail
    assert tail == [sorted(counted(step)) for step in first]


def test_epochs_differ_and_seeds_differ() -> None:
    orders = [[counted(step) for step in rows(12, epochs=2, seed=seed)] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert orders[0][:2] != orders[0][2:]
    assert [counted(step) for step in rows(7, shuffle=False)] == [[0, 1, 2, 3, 4, 5], [6]]


def test_sorting_by_size_changes_the_order_within_a_step_alone() -> None:
    plain, by_size = rows(20), rows(20, size=lambda item: -item)
    for step, again in zip(plain, by_size, strict=True):
        assert counted(again) == sorted(counted(step), reverse=True)


def test_without_weights_a_rank_may_have_nothing() -> None:
    def bare(items: Sequence[int]) -> Batch:
        return {"tokens_B": torch.tensor(items)}

    pairs = [
        Rows(range(1), bare, batch_size=4, micro_batch_size=1, ranks=member(rank, 2))
        for rank in range(2)
    ]
    assert [len(next(source)) for source in pairs] == [1, 0]


def test_what_a_rank_borrows_counts_nothing() -> None:
    def padded(items: Sequence[int]) -> Batch:
        return {
            "tokens_BT": torch.ones(len(items), 5),
            "weights_BT": torch.ones(len(items), 5),
            "read_B": torch.full((len(items),), 4),
        }

    shares = [
        Rows(range(1), padded, batch_size=4, micro_batch_size=1, ranks=member(rank, 2))
        for rank in range(2)
    ]
    assert [count_tokens(batch) for share in shares for batch in next(share)] == [(4, 5), (0, 0)]


def test_errors() -> None:
    with pytest.raises(UserError, match="nothing to train on"):
        rows(0)

    with pytest.raises(UserError, match="batch_size 0"):
        rows(3, batch_size=0)

    for other in (rows(21), rows(20, seed=4), rows(20, batch_size=5)):
        with pytest.raises(UserError, match="the checkpoint was taken with"):
            other.load_state_dict(rows(20).state_dict())


def test_split_and_whole_give_the_same_loss() -> None:
    """A mean over a step's targets, computed from summed losses and weights, is the same however
    the step is split."""
    draw = np.random.default_rng(0)
    items = [
        (draw.integers(3, 90, size).tolist(), (draw.random(size) < 0.5).tolist())
        for size in draw.integers(2, 20, 50)
    ]
    packed = pack([Segment(np.array(ids), np.array(mask)) for ids, mask in items], 24).rows
    table = torch.rand(90, dtype=torch.float64)

    def losses(micro: int, world: int) -> list[float]:
        sources = [
            Rows(packed, collate, batch_size=5, micro_batch_size=micro, ranks=member(rank, world))
            for rank in range(world)
        ]
        found = []
        for step in zip(*sources, strict=True):
            parts = [batch for batches in step for batch in batches]
            total = sum(
                float((table[part["targets_BT"]] * part["weights_BT"]).sum()) for part in parts
            )
            found.append(total / sum(float(part["weights_BT"].sum()) for part in parts))

        return found

    assert losses(2, 1) == pytest.approx(losses(5, 1), rel=1e-12)
    assert losses(1, 3) == pytest.approx(losses(5, 1), rel=1e-12)


def cost(model: Llama, batch: Batch) -> float:
    with torch.no_grad():
        return float(next_token(model, batch).total)


def test_packed_dialogs_cost_what_they_cost_alone() -> None:
    torch.manual_seed(0)
    model = Llama(
        LlamaConfig(
            vocab_size=90,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    ).eval()
    draw = np.random.default_rng(1)
    items = [
        (draw.integers(3, 90, size).tolist(), (draw.random(size) < 0.6).tolist())
        for size in draw.integers(3, 20, 12)
    ]
    packed = pack([Segment(np.array(ids), np.array(mask)) for ids, mask in items], 24)
    together = cost(model, collate(packed.rows, 24))
    alone = sum(cost(model, collate([[segment]])) for row in packed.rows for segment in row)
    assert len(packed.rows) < len(items)
    assert together == pytest.approx(alone, rel=1e-5)
    mixed = cost(model, collate(packed.rows, 24, separate=False))
    assert mixed != pytest.approx(alone, rel=1e-4)
