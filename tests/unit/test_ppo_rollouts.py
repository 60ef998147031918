"""PPO's data: advantages against a slow reference, whitening, where reward and mask stand, what is
asserted."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from answers import answer, score
from hypothesis import given
from hypothesis import strategies as st

from llama2.formats import checkpoint
from llama2.generate.dialogue import Chat
from llama2.generate.engine import Engine
from llama2.generate.rewards import RewardModels
from llama2.ranks import Ranks
from llama2.stages import ppo
from llama2.stages.common import ppo_health, ppo_rollouts
from llama2.stages.common.sampling import Sample, load_rewards, read_prompts
from llama2.tokenizer.tokenizer import Tokenizer
from llama2.train import hooks, optim
from llama2.train.learner import Learner
from llama2.train.loop import Plan, Report, fit
from llama2.train.objectives import make_ppo_loss

SETTINGS = ppo_rollouts.Settings(
    batch_size=8,
    minibatch_size=4,
    micro_batch_size=3,
    epochs=2,
    beta=0.1,
    gamma=1.0,
    lambda_=0.95,
    unfinished=None,
    sample=Sample(max_tokens=12, precision="fp32"),
    precision="fp32",
    seed=0,
)


def slow_advantages(rewards, values, gamma, lambda_):
    """A_t = sum over l of (gamma lambda)^l delta_{t+l}, from the definition."""
    count = len(rewards)
    values = [*values, 0.0]
    deltas = [rewards[t] + gamma * values[t + 1] - values[t] for t in range(count)]

    return [
        sum((gamma * lambda_) ** lag * deltas[t + lag] for lag in range(count - t))
        for t in range(count)
    ]


@given(st.data(), st.floats(0, 1), st.floats(0, 1))
def test_advantages_are_those_of_the_definition(data, gamma, lambda_):
    shapes = data.draw(
        st.lists(st.tuples(st.integers(0, 3), st.integers(1, 6)), min_size=1, max_size=3)
    )
    width = max(before + count for before, count in shapes) + 1
    numbers = st.floats(-3, 3, width=32)
    reward_BT, value_BT, mask_BT = (torch.zeros(len(shapes), width) for _ in range(3))
    expected_BT = torch.zeros(len(shapes), width)

    for row, (before, count) in enumerate(shapes):
        rewards, values = (
            data.draw(st.lists(numbers, min_size=count, max_size=count)) for _ in range(2)
        )
        here = slice(before, before + count)
        reward_BT[row, here], value_BT[row, here] = torch.tensor(rewards), torch.tensor(values)
        mask_BT[row, here] = 1
        expected_BT[row, here] = torch.tensor(slow_advantages(rewards, values, gamma, lambda_))

    found_BT = ppo_rollouts.estimate_advantages(reward_BT, value_BT, mask_BT, gamma, lambda_)
    torch.testing.assert_close(found_BT, expected_BT, rtol=1e-4, atol=1e-4)


def test_with_gamma_and_lambda_one_returns_are_what_is_still_to_come():
    reward = torch.tensor([[0.0, -1.0, 2.0, 5.0]])
    value = torch.tensor([[9.0, 0.5, 0.25, 1.0]])
    mask = torch.tensor([[0.0, 1.0, 1.0, 1.0]])
    returns = ppo_rollouts.estimate_advantages(reward, value * mask, mask, 1.0, 1.0) + value * mask
    torch.testing.assert_close(returns, torch.tensor([[0.0, 6.0, 7.0, 5.0]]))


def test_whitened_rewards_have_mean_zero_and_deviation_one():
    values = torch.tensor([3.0, -1.0, 4.0, 1.5, -9.0])
    found = ppo_rollouts.whiten(values)
    torch.testing.assert_close(found, (values - values.mean()) / values.std(correction=0))
    assert float(found.mean()) == pytest.approx(0, abs=1e-6)
    assert float((found**2).mean()) == pytest.approx(1)

    # answers of equal reward say nothing, whatever rounding makes of their mean
    for equal in (2.5, 3.3, -1e4 / 3):
        assert ppo_rollouts.whiten(torch.full((500,), equal)).tolist() == [0.0] * 500


def test_collate_puts_mask_on_the_answer_and_reward_on_its_last_token():
    rows = [
        answer(prompt=(1, 5, 6), tokens=(7, 8, 2), logprobs=(-0.1, -0.2, -0.3)),
        answer(prompt=(1,), tokens=(9, 2), logprobs=(-0.4, -0.5)),
        answer(prompt=(1, 5), tokens=(9,), logprobs=(-0.6,), finish="length"),
    ]
    found = ppo_rollouts.collate(rows, torch.tensor([0.5, -2.0, 3.0]))
    assert found["tokens_BT"].tolist() == [[1, 5, 6, 7, 8], [1, 9, 0, 0, 0], [1, 5, 0, 0, 0]]
    assert found["targets_BT"].tolist() == [[5, 6, 7, 8, 2], [9, 2, 0, 0, 0], [5, 9, 0, 0, 0]]
    assert found["weights_BT"].tolist() == [[0, 0, 1, 1, 1], [1, 1, 0, 0, 0], [0, 1, 0, 0, 0]]
    assert found["read_B"].tolist() == [5, 2, 2]
    assert found["final_BT"].tolist() == [[0, 0, 0, 0, 0.5], [0, -2, 0, 0, 0], [0, 3, 0, 0, 0]]
    torch.testing.assert_close(
        found["engine_BT"],
        torch.tensor([[0, 0, -0.1, -0.2, -0.3], [-0.4, -0.5, 0, 0, 0], [0, -0.6, 0, 0, 0]]),
    )

    for row, one in enumerate(rows):
        learnt = found["targets_BT"][row][found["weights_BT"][row].bool()].tolist()
        assert tuple(learnt) == one.completion.tokens


def test_what_the_samples_look_like():
    some = [answer(tokens=(5, 2)), answer(tokens=(5, 6, 7, 8), finish="length")]
    found = ppo_rollouts.describe(some, [score(0.0, 1.0, -1.0), score(2.0, 1.0, 3.0)])
    assert (found["ppo/length"], found["ppo/eos_rate"], found["reward/raw"]) == (3.0, 0.5, 1.0)
    assert found["reward/length_correlation"] == pytest.approx(1.0)
    assert "reward/safety" in found
    assert "reward/safety" not in ppo_rollouts.describe(some, [score(0.0, 1.0, float("inf"))] * 2)


# --- with a model ---


class Rig:
    """Everything PPO has, small."""

    def __init__(self, policy, scorers, prompts, **changes):
        self.settings = dataclasses.replace(SETTINGS, **changes)
        self.tokenizer = Tokenizer.load(policy)
        self.actor, self.reference = checkpoint.load(policy), checkpoint.load(policy)
        self.models = ppo_rollouts.ActorCritic(self.actor, checkpoint.load_scorer(scorers[0]))
        rewards = load_rewards(
            RewardModels(helpful=scorers[0], safe=scorers[1]), self.tokenizer, Ranks.alone(), "fp32"
        )
        chat = Chat(Engine(self.actor, slots=8, precision="fp32"), self.tokenizer)
        self.seen = []
        self.source = ppo_rollouts.Rollouts(
            self.models,
            self.reference,
            rewards,
            chat,
            read_prompts(prompts, None, 0),
            self.settings,
            3,
            self.seen.append,
        )


@pytest.fixture
def rig(policy, scorers, prompts):
    def make(**changes) -> Rig:
        return Rig(policy, scorers, prompts, **changes)

    return make


def test_an_iteration_has_its_updates_and_each_answer_in_every_epoch(rig):
    made = rig()
    assert made.source.updates == 4
    updates = [next(made.source) for _ in range(4)]
    assert made.source.iteration == 1
    rows = [
        [tuple(row) for batch in update for row in batch["tokens_BT"].tolist()]
        for update in updates
    ]
    assert [len(one) for one in rows] == [4, 4, 4, 4]
    assert rows[:2] == rows[2:]

    for _ in range(8):
        next(made.source)

    with pytest.raises(StopIteration):
        next(made.source)

    assert len(made.seen) == 3


def test_advantages_are_whitened_over_the_whole_iteration(rig):
    made = rig(epochs=1)
    batches = [batch for _ in range(2) for batch in next(made.source)]
    values = torch.cat([batch["advantages_BT"][batch["weights_BT"].bool()] for batch in batches])
    assert float(values.mean()) == pytest.approx(0, abs=1e-5)
    assert float(values.std(correction=0)) == pytest.approx(1, abs=1e-4)
    assert all(not batch["advantages_BT"][~batch["weights_BT"].bool()].any() for batch in batches)


def test_every_prompt_is_asked_once_before_any_is_asked_again(rig):
    made = rig()
    asked = []
    for _ in range(4):
        asked += [one.id for one in made.source._choose()]
        made.source.iteration += 1

    assert len(asked) == 32
    assert sorted(asked[:16]) == sorted(asked[16:]) == sorted({*asked})
    assert asked[:16] != asked[16:]


def test_the_engine_and_the_trainer_agree_about_log_probabilities(rig):
    made = rig()
    next(made.source)
    assert made.seen[0]["ppo/engine_gap"] < 1e-4


def test_the_kl_penalty_is_spread_over_the_tokens(rig, monkeypatch):
    """With gamma and lambda 1 the return of a token is the score minus beta times the KL of all
    tokens from it on."""
    monkeypatch.setattr(ppo_rollouts, "keep_training_tensors", lambda batch: batch)
    made = rig(beta=0.5, gamma=1.0, lambda_=1.0, epochs=1)
    with torch.no_grad():
        made.reference.lm_head.weight.mul_(1.2)

    total, rows = 0.0, 0
    for batch in (batch for _ in range(2) for batch in next(made.source)):
        kl_BT = batch["kl_BT"]
        with torch.no_grad():
            reference_BT = made.reference(batch["tokens_BT"], targets_BT=batch["targets_BT"])

        assert torch.equal(kl_BT, (batch["old_logp_BT"] - reference_BT) * batch["weights_BT"])
        reward_BT = batch["final_BT"] - 0.5 * kl_BT
        expected_BT = reward_BT.flip(1).cumsum(1).flip(1) * batch["weights_BT"]
        torch.testing.assert_close(batch["returns_BT"], expected_BT, rtol=1e-4, atol=1e-4)
        total, rows = total + float(kl_BT.sum()), rows + len(kl_BT)

    assert made.seen[0]["ppo/kl_reference"] == pytest.approx(total / rows, rel=1e-4)
    assert abs(total) > 1e-2


def test_an_answer_that_never_ends_may_be_given_a_score_of_its_own(rig):
    cut = answer(finish="length")
    assert rig(unfinished=-3.0).source._reward(cut, score(2.0)) == -3.0
    assert rig(unfinished=-3.0).source._reward(answer(), score(2.0)) == 2.0
    assert rig().source._reward(cut, score(2.0)) == 2.0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_first_ratio_is_exactly_one_and_the_first_kl_exactly_zero(rig, precision):
    made = rig(
        precision=precision, sample=SETTINGS.sample.model_copy(update={"precision": precision})
    )
    watch, reports = ppo.Watch(kl_stop=1e9, updates=4), []
    made.source.observe = lambda found: (made.seen.append(found), watch.observe(found))
    watch_step = watch.on_step

    def on_step(training, report: Report):
        reports.append(report)
        watch_step(training, report)

    watch.on_step = on_step
    learner = Learner(
        made.models,
        Ranks.alone(),
        optim.AdamW(learning_rate=1e-3),
        precision=precision,
        apart=("actor.", "critic."),
    )
    fit(learner, made.source, make_ppo_loss(), Plan(schedule="constant", max_steps=12), [watch])
    deviations = [report.sums["ppo/ratio_deviation"] for report in reports]
    assert [deviations[step] for step in (0, 4, 8)] == [0.0, 0.0, 0.0]
    assert all(deviations[step] > 0 for step in (1, 2, 3, 5, 6, 7))
    assert made.seen[0]["ppo/first_kl"] == made.seen[0]["ppo/kl_reference"] == 0.0
    assert made.seen[1]["ppo/kl_reference"] != 0.0


def test_a_policy_that_is_not_its_reference_is_measured(rig):
    made = rig(epochs=1)
    with torch.no_grad():
        made.reference.lm_head.weight[3] += 0.5

    for _ in range(4):
        next(made.source)

    assert made.seen[0]["ppo/first_kl"] > 1e-4
    assert "ppo/first_kl" not in made.seen[1]  # later the policy has moved


def test_a_first_ratio_that_is_not_one_is_logged_and_raises_an_alarm(rig, capsys):
    made = rig()
    first = next(made.source)
    first[0]["old_logp_BT"] += 1e-2 * first[0]["weights_BT"]
    made.source.buffer.insert(0, first)
    logged, watch = {}, ppo.Watch(kl_stop=9.0, updates=4)
    doctor = ppo_health.Doctor(list, kl_stop=9.0, precision="fp32", ranks=Ranks.alone())
    watch.observe(made.seen[0])
    fit(
        Learner(made.models, Ranks.alone(), apart=("actor.", "critic.")),
        made.source,
        make_ppo_loss(),
        Plan(schedule="constant", max_steps=4),
        [hooks.Log(lambda step, row: logged.update(row)), watch, doctor],
    )
    part = sum(float(batch["weights_BT"].sum()) for batch in first[:1])
    whole = sum(float(batch["weights_BT"].sum()) for batch in first)
    expected = (1 - math.exp(-1e-2)) * part / whole
    assert logged["ppo/first_ratio_deviation"] == pytest.approx(expected, rel=1e-3)
    assert logged["ppo/first_kl"] == 0.0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "alarm at step 4: the first ratios of an iteration are not 1, by more than 0.0001: "
    )
    assert "(ppo/first_ratio_deviation 0.00" in line


# --- the scale of the critic ---


def explained(batches) -> float:
    """1 - Var(return - value) / Var(return) over the answers' tokens."""
    masks = [batch["weights_BT"].bool() for batch in batches]
    returns = torch.cat([batch["returns_BT"][mask] for batch, mask in zip(batches, masks)])
    values = torch.cat([batch["old_values_BT"][mask] for batch, mask in zip(batches, masks)])

    return 1 - float((returns - values).var() / returns.var())


@pytest.mark.parametrize(("factor", "shift"), [(1.0, 0.0), (-300.0, 40.0), (0.001, -7.0)])
def test_the_critic_starts_on_the_scale_of_whitened_returns(rig, factor, shift):
    """Whatever the reward model's own scale: its first values are the best linear guess of what is
    to come."""
    made, plain = rig(epochs=1, lambda_=1.0), rig(epochs=1, lambda_=1.0)
    plain.source.scaled = True  # as it was
    made.models.rescale(factor, shift)
    batches = [batch for _ in range(2) for batch in next(made.source)]
    raw = [batch for _ in range(2) for batch in next(plain.source)]
    mask = torch.cat([batch["weights_BT"].flatten() for batch in batches]).bool()
    x = torch.cat([batch["old_values_BT"].flatten() for batch in raw])[mask].double().numpy()
    # lambda 1: no critic in it
    y = torch.cat([batch["returns_BT"].flatten() for batch in raw])[mask].double().numpy()
    gain, offset = np.polyfit(x, y, 1)
    found = torch.cat([batch["old_values_BT"].flatten() for batch in batches])[mask].numpy()
    np.testing.assert_allclose(found, gain * x + offset, rtol=1e-3, atol=1e-4)
    assert explained(batches) >= 0
    assert abs(found.mean()) < 1

    for batch in batches:  # and the model itself says so from now on
        with torch.no_grad():
            _, _, values_BT = made.models(batch["tokens_BT"], targets_BT=batch["targets_BT"])

        torch.testing.assert_close(
            values_BT * batch["weights_BT"], batch["old_values_BT"], rtol=1e-4, atol=1e-4
        )


def test_the_critic_is_scaled_once_and_resumes_with_its_scale(rig, tmp_path):
    made, other = rig(epochs=1), rig(epochs=1)
    for _ in range(2):
        next(made.source)

    head, moved = made.models.critic.score.weight.clone(), made.models.shift.clone()
    torch.save(
        (made.source.state_dict(), Learner(made.models, Ranks.alone()).state_dict()),
        tmp_path / "state.pt",
    )
    source, learner = torch.load(tmp_path / "state.pt", weights_only=True)
    other.source.load_state_dict(source)
    Learner(other.models, Ranks.alone()).load_state_dict(learner)

    for one in (made, other):
        next(one.source)
        assert torch.equal(one.models.critic.score.weight, head)
        assert torch.equal(one.models.shift, moved)

    assert moved.item() != 0
    assert made.seen[1]["ppo/kl_reference"] == other.seen[0]["ppo/kl_reference"]


def test_equal_rewards_teach_nothing_and_set_no_scale(rig):
    made = rig(epochs=1)
    made.source._reward = lambda one, mark: 3.3
    head = made.models.critic.score.weight.clone()
    batches = [batch for _ in range(2) for batch in next(made.source)]
    assert made.seen[0]["reward/deviation"] < 1e-6
    assert torch.equal(made.models.critic.score.weight, head)
    assert not made.source.scaled
    del made.source._reward
    next(made.source)
    assert made.source.scaled
    assert batches


def test_the_engine_is_given_the_policy_before_every_iteration(rig, monkeypatch):
    made, given = rig(), []
    monkeypatch.setattr(made.source.chat.engine, "update", given.append)
    for _ in range(made.source.updates + 1):
        next(made.source)

    assert given == [made.models.actor, made.models.actor]


def test_any_seed_of_64_bits_is_one(rig):
    for seed in (2**63 - 1, -5, 2**64 + 3):
        made = rig(epochs=1, seed=seed)
        next(made.source)
        assert len(made.source.samples) == 8


def test_a_saved_place_inside_an_iteration_gives_the_same_batches(rig, tmp_path):
    made, other = rig(), rig()
    next(made.source)
    torch.save((made.source.state_dict(), made.models.state_dict()), tmp_path / "state.pt")
    source, models = torch.load(tmp_path / "state.pt", weights_only=True)
    other.source.load_state_dict(source)
    other.models.load_state_dict(models)  # with the scale of the critic

    for _ in range(6):
        for mine, theirs in zip(next(made.source), next(other.source), strict=True):
            assert mine.keys() == theirs.keys()
            assert all(torch.equal(mine[name], theirs[name]) for name in mine)
