"""Losses against computations by hand."""

import math

import pytest
import torch
from torch import nn

from llama2.records import DEGREES
from llama2.train import objectives
from llama2.train.loop import average


class Fixed(nn.Module):
    """Answers what it was told to, whatever it is asked."""

    def __init__(self, *answers: torch.Tensor) -> None:
        super().__init__()
        self.answers = nn.ParameterList(answers)

    def forward(self, tokens_BT, **asked):
        self.asked = asked
        return self.answers[0] if len(self.answers) == 1 else tuple(self.answers)


def numbers(metrics):
    return {name: float(value) for name, value in metrics.items()}


def test_next_token_counts_weighted_targets_only():
    model = Fixed(torch.tensor([[-1.0, -2.0, -4.0]]))
    batch = {
        "tokens_BT": torch.zeros(1, 3, dtype=torch.long),
        "targets_BT": torch.zeros(1, 3, dtype=torch.long),
        "weights_BT": torch.tensor([[True, False, True]]),
        "documents_BT": torch.zeros(1, 3, dtype=torch.long),
    }
    loss = objectives.next_token(model, batch)
    assert (float(loss.total.detach()), float(loss.weight)) == (5.0, 2.0)
    assert set(model.asked) == {"targets_BT", "documents_BT"}


def pairs(safe=None):
    batch = {
        "tokens_BT": torch.zeros(8, 2, dtype=torch.long),
        "lengths_B": torch.full((8,), 2),
        "degrees_P": torch.tensor([0, 1, 2, 0]),
    }
    return batch if safe is None else batch | {"safe_B": torch.tensor(safe)}


CHOSEN, REJECTED = [2.0, 0.5, -1.0, 0.0], [0.0, 1.0, -1.0, 1.0]


@pytest.mark.parametrize(
    ("margins", "table"), [("none", (0, 0, 0)), ("small", (1, 2 / 3, 1 / 3)), ("large", (3, 2, 1))]
)
def test_ranking_loss_by_hand(margins, table):
    loss = objectives.make_ranking_loss(margins)(Fixed(torch.tensor(CHOSEN + REJECTED)), pairs())
    expected = sum(
        math.log1p(math.exp(-(c - r - table[d]))) for c, r, d in zip(CHOSEN, REJECTED, (0, 1, 2, 0))
    )
    assert float(loss.total.detach()) == pytest.approx(expected, rel=1e-6)
    assert float(loss.weight) == 4
    rates = average(numbers(loss.metrics), 4)
    assert rates["reward/accuracy"] == (1 + 0 + 0.5 + 0) / 4
    assert rates["reward/accuracy/significantly"] == 0.5
    assert rates["reward/accuracy/better"] == 0
    assert "reward/accuracy/negligibly" not in rates  # none seen


def test_margins_shrink_with_the_degree():
    assert DEGREES[0] == "significantly"
    for table in objectives.MARGINS.values():
        assert len(table) == len(DEGREES)
        assert list(table) == sorted(table, reverse=True)


def test_auxiliary_loss_reads_labelled_answers_only():
    score = torch.tensor(CHOSEN + REJECTED)
    safe = [1, -1, 0, -1, 0, -1, -1, -1]
    plain = objectives.make_ranking_loss("small")(Fixed(score), pairs())
    loss = objectives.make_ranking_loss("small", 0.5)(Fixed(score), pairs(safe))
    # chosen 0 and 2, rejected 0
    auxiliary = math.log1p(math.exp(-2.0)) + math.log1p(math.exp(-1.0)) + math.log(2)
    assert float((loss.total - plain.total).detach()) == pytest.approx(
        0.5 * auxiliary / 2, rel=1e-5
    )
    rates = average(numbers(loss.metrics), 4)
    assert rates["reward/safety_loss"] == pytest.approx(auxiliary / 3, rel=1e-5)
    assert rates["reward/safety_accuracy"] == pytest.approx(1.0)
    assert rates["reward/ranking_loss"] == pytest.approx(float(plain.total.detach()) / 4)


def test_pairs_of_weight_zero_count_nothing():
    score = torch.tensor(CHOSEN + REJECTED)
    everything = objectives.make_ranking_loss("small", 0.5)(Fixed(score), pairs([1] * 8))
    weights = torch.tensor([1.0, 0.0, 1.0, 1.0])
    without = objectives.make_ranking_loss("small", 0.5)(
        Fixed(score), pairs([1] * 8) | {"weights_P": weights}
    )
    alone = objectives.make_ranking_loss("small", 0.5)(
        Fixed(score), pairs([1] * 8) | {"weights_P": 1 - weights}
    )
    torch.testing.assert_close(without.total + alone.total, everything.total)

    for name, value in everything.metrics.items():
        torch.testing.assert_close(without.metrics[name] + alone.metrics[name], value, msg=name)

    assert float(alone.weight) == 1


def ppo_batch(logp, old_logp, advantages, returns, old_values, mask):
    rows = {
        "old_logp_BT": old_logp,
        "advantages_BT": advantages,
        "returns_BT": returns,
        "old_values_BT": old_values,
        "weights_BT": mask,
    }
    shape = (1, len(logp))
    batch = {name: torch.tensor([row]) for name, row in rows.items()}

    return batch | {
        name: torch.zeros(shape, dtype=torch.long) for name in ("tokens_BT", "targets_BT")
    }


def test_clipped_by_hand():
    ratios = [1.5, 0.5, 1.1, 9.0]
    logp = [math.log(r) for r in ratios]
    batch = ppo_batch(
        logp,
        [0.0] * 4,
        [1.0, -2.0, 3.0, 7.0],
        [1.0, 0.0, 2.0, 9.0],
        [0.0, 0.0, 1.9, 0.0],
        [1.0, 1.0, 1.0, 0.0],
    )
    values = [0.5, 0.1, 2.0, 0.0]
    model = Fixed(
        torch.tensor([logp]), torch.tensor([[0.7, 0.3, 0.2, 5.0]]), torch.tensor([values])
    )
    loss = objectives.make_ppo_loss(0.2, 0.2, 0.5)(model, batch)
    # ratio 1.5 gains nothing beyond 1.2; ratio 0.5 with a negative advantage counts at 0.8; 1.1 is
    # inside
    policy = -(1.2 * 1.0 + 0.8 * -2.0 + 1.1 * 3.0)
    value = 0.5 * ((0.2 - 1.0) ** 2 + 0.1**2 + 0.0)  # the first is held at 0.2 from its old value
    assert float(loss.total.detach()) == pytest.approx(policy + 0.5 * value, rel=1e-5)
    assert float(loss.weight) == 3
    metrics = average(numbers(loss.metrics), 3)
    assert metrics["ppo/clip_fraction"] == pytest.approx(2 / 3)
    assert metrics["ppo/entropy"] == pytest.approx(1.2 / 3)
    assert metrics["ppo/kl"] == pytest.approx(
        sum(r - 1 - math.log(r) for r in ratios[:3]) / 3, rel=1e-5
    )
    assert metrics["ppo/ratio_deviation"] == pytest.approx((0.5 + 0.5 + 0.1) / 3, rel=1e-5)
    errors, returns = torch.tensor([0.5, -0.1, 0.0]), torch.tensor([1.0, 0.0, 2.0])
    expected = 1 - errors.var(correction=0) / returns.var(correction=0)
    assert objectives.compute_explained_variance(metrics)[
        "ppo/explained_variance"
    ] == pytest.approx(float(expected), rel=1e-5)


def test_clipping_stops_the_gradient():
    logp = torch.tensor([[math.log(1.5), math.log(0.5), math.log(1.1)]])
    batch = ppo_batch([0.0] * 3, [0.0] * 3, [1.0, -1.0, 1.0], [0.0] * 3, [0.0] * 3, [1.0] * 3)
    model = Fixed(logp, torch.zeros(1, 3), torch.zeros(1, 3))
    objectives.make_ppo_loss()(model, batch).total.backward()
    gradient = model.answers[0].grad[0]
    assert gradient[:2].tolist() == [0.0, 0.0]
    assert float(gradient[2]) == pytest.approx(-1.1, rel=1e-6)


def test_ppo_starts_at_ratio_one_and_no_divergence():
    logp = torch.randn(2, 5).sub(3)
    batch = ppo_batch([0.0] * 5, [0.0] * 5, [1.0] * 5, [0.0] * 5, [0.0] * 5, [1.0] * 5)
    batch["old_logp_BT"] = logp.clone()
    metrics = objectives.make_ppo_loss()(
        Fixed(logp, torch.zeros(2, 5), torch.zeros(2, 5)), batch
    ).metrics
    assert [
        float(metrics[f"ppo/{name}"]) for name in ("ratio_deviation", "kl", "clip_fraction")
    ] == [0, 0, 0]


def test_explained_variance_of_constant_returns_is_undefined():
    constant = {
        "ppo/return": 1.0,
        "ppo/return_square": 1.0,
        "ppo/error": 0.0,
        "ppo/error_square": 0.5,
    }
    assert objectives.compute_explained_variance(constant) == {}
    assert objectives.compute_explained_variance({"train/loss": 1.0}) == {}
