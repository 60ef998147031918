"""Scores and log-probabilities do not depend on batching, padding, order or ranks."""

import pytest
import torch

from llama2.errors import UserError
from llama2.generate import score
from llama2.generate.score import compute_logprobs, score_rows
from llama2.model.llama import Llama, LlamaConfig
from llama2.model.scorer import Scorer
from llama2.ranks import Axis, Ranks

CONFIG = LlamaConfig(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
LENGTHS = (5, 17, 1, 40, 2, 17, 63, 64)


@pytest.fixture(scope="module")
def rows() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 96, (length,), generator=generator).tolist() for length in LENGTHS]


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    model = Scorer(CONFIG)
    with torch.no_grad():
        model.score.weight.mul_(50)

    return model


@pytest.mark.parametrize("batch_tokens", [1, 70, 200, 16384])
def test_a_reward_is_the_score_of_the_row_alone(
    scorer: Scorer, rows: list[list[int]], batch_tokens: int
) -> None:
    with torch.no_grad():
        alone = [float(scorer(torch.tensor([row]))[0, -1]) for row in rows]

    assert max(alone) - min(alone) > 1
    assert score_rows(scorer, rows, "fp32", batch_tokens) == pytest.approx(alone, abs=1e-5)
    assert score_rows(scorer, rows[::-1], "fp32", batch_tokens) == pytest.approx(
        alone[::-1], abs=1e-5
    )


@pytest.mark.parametrize("batch_tokens", [1, 70, 16384])
def test_logprobs_are_those_of_the_row_alone(rows: list[list[int]], batch_tokens: int) -> None:
    model = Llama(CONFIG)
    found = compute_logprobs(model, rows, "fp32", batch_tokens)
    for row, mine in zip(rows, found):
        with torch.no_grad():
            logits = model(torch.tensor([row]))[0].log_softmax(-1)

        expected = [float(logits[place, token]) for place, token in enumerate(row[1:])]
        assert mine == pytest.approx(expected, abs=1e-5)

    assert [len(mine) for mine in found] == [length - 1 for length in LENGTHS]


def test_batches_hold_at_most_their_tokens() -> None:
    batches = score._make_batches(LENGTHS, 80)
    assert sorted(index for batch in batches for index in batch) == list(range(len(LENGTHS)))
    assert all(
        len(batch) == 1 or max(LENGTHS[index] for index in batch) * len(batch) <= 80
        for batch in batches
    )
    assert len(batches) < len(LENGTHS)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_each_rank_does_its_batches_in_as_many_passes(
    scorer: Scorer, rows: list[list[int]], rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, passes = score_rows(scorer, rows, "fp32", 80), []
    handle = scorer.register_forward_pre_hook(lambda *_: passes.append(1))
    parts: list[list[list[float]]] = []

    def unshare(mine: list[list[float]]) -> list[list[float]]:
        parts.append(mine)
        batches = score._make_batches(LENGTHS, 80)
        results = [[whole[index] for index in batch] for batch in batches]
        assert [len(part) for part in mine] == [len(batch) for batch in batches[rank::3]]

        for part, expected in zip(mine, results[rank::3]):
            assert part == pytest.approx(expected, abs=1e-5)

        return results

    ranks = Ranks(torch.device("cpu"), rank, 3, replicate=Axis(3, rank))
    monkeypatch.setattr(Ranks, "unshare", lambda _, mine: unshare(mine))
    assert score_rows(scorer, rows, "fp32", 80, ranks=ranks) == whole
    assert len(passes) == -(-len(score._make_batches(LENGTHS, 80)) // 3)
    handle.remove()


def test_rows_beyond_the_context_are_refused(scorer: Scorer) -> None:
    with pytest.raises(UserError, match="row 2 of 2 has 65 tokens"):
        score_rows(scorer, [[5], [5] * 65])

    with pytest.raises(UserError, match="row 1 of 1 has 0 tokens"):
        score_rows(scorer, [[]])

    assert score_rows(scorer, []) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_score_that_is_not_finite_names_the_model(rows: list[list[int]], value: float) -> None:
    model = Scorer(CONFIG)
    with torch.no_grad():
        model.model.embed_tokens.weight[rows[3][-1]] = value

    bad = [index for index, row in enumerate(rows) if rows[3][-1] in row]
    with pytest.raises(UserError) as error:
        score_rows(model, rows, "fp32", name="runs/safe5")

    assert error.value.cause.startswith(
        f"runs/safe5: {len(bad)} of {len(rows)} scores are not finite numbers (the "
    )
    assert f"of row {bad[0] + 1} with {LENGTHS[bad[0]]} tokens" in error.value.cause
    assert "train it again" in error.value.cure
