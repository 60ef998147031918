"""The PPO doctor: what is an alarm, when it begins, and what is noise."""

import pytest

from llama2.stages.health import alarms, rules


def rows(metric, values):
    return [{"step": float(step), metric: value} for step, value in enumerate(values, 1)]


HEALTHY = {"ppo/kl_reference": [0.0, 0.5, 1.0, 2.0], "ppo/entropy": [2.0, 1.9, 1.8, 1.7],
           "ppo/clip_fraction": [0.0, 0.1, 0.1, 0.05], "ppo/explained_variance": [-3.0, 0.2, 0.5, 0.8],
           "ppo/eos_rate": [0.9, 0.95, 0.9, 0.9], "ppo/length": [20.0, 25.0, 30.0, 22.0],
           "reward/length_correlation": [0.1, 0.2, 0.2, 0.3], "ppo/engine_gap": [0.01, 0.02, 0.01, 0.01],
           "heldout/reward": [0.5, 0.55, 0.6, 0.58]}


@pytest.mark.parametrize("metric", HEALTHY)
def test_a_healthy_run_has_no_alarm(metric):
    assert alarms(rows(metric, HEALTHY[metric]), kl_stop=10.0) == []


@pytest.mark.parametrize(("metric", "values", "step", "words"), [
    ("ppo/kl_reference", [0, 3, 9, 9.5], 3, "raise beta"),
    ("ppo/kl_reference", [0, -2, -3, -3], 2, "top_p"),
    ("ppo/entropy", [2, 1, 0.4, 0.3], 3, "collapsed"),
    ("ppo/clip_fraction", [0.1, 0.4, 0.5, 0.1], 2, "lower the learning rate"),
    ("ppo/explained_variance", [-1, -1, 0.5, -0.8, -0.9], 4, "critic_learning_rate"),
    ("ppo/eos_rate", [0.9, 0.6, 0.5, 0.5], 2, "unfinished"),
    ("ppo/length", [20, 30, 45, 50], 3, "length"),
    ("ppo/length", [20, 9, 8, 8], 2, "length"),
    ("reward/length_correlation", [0.1, 0.8, 0.9, 0.8], 2, "balance lengths"),
    ("ppo/engine_gap", [0.01, 0.2, 0.2, 0.2], 2, "fp32"),
    ("heldout/reward", [0.5, 0.44, 0.43, 0.4], 2, "patience"),
])
def test_each_alarm_names_the_first_bad_step_a_cause_and_a_remedy(metric, values, step, words):
    (found,) = alarms(rows(metric, values), kl_stop=10.0)
    assert (found["name"], found["step"], found["value"]) == (metric, step, values[step - 1])
    assert words in f"{found['cause']} {found['remedy']}"
    assert found["cause"]
    assert found["remedy"]


def test_one_bad_value_is_noise_unless_it_is_the_last():
    assert alarms(rows("ppo/clip_fraction", [0.1, 0.5, 0.1, 0.1]), 10.0) == []
    assert [one["step"] for one in alarms(rows("ppo/clip_fraction", [0.1, 0.1, 0.5]), 10.0)] == [3]


def test_a_run_without_metrics_has_no_alarm():
    assert alarms([], 10.0) == []
    assert alarms([{"step": 1.0, "train/loss": 3.0}], 10.0) == []
    assert {rule.metric for rule in rules(10.0)} == set(HEALTHY)
