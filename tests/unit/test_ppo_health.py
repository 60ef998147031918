"""The PPO doctor: what is an alarm, when it begins, and what is noise."""

import pytest

from llama2.ranks import Ranks
from llama2.stages.common.ppo_health import TOLERANCE, Doctor, find_alarms, list_rules
from llama2.train.loop import Plan, TrainingState


def rows(metric, values):
    return [{"step": float(step), metric: value} for step, value in enumerate(values, 1)]


HEALTHY = {
    "ppo/kl_reference": [0.0, 0.5, 1.0, 2.0],
    "ppo/entropy": [2.0, 1.9, 1.8, 1.7],
    "ppo/clip_fraction": [0.0, 0.1, 0.1, 0.05],
    "ppo/explained_variance": [-3.0, 0.2, 0.5, 0.8],
    "ppo/eos_rate": [0.9, 0.95, 0.9, 0.9],
    "ppo/length": [20.0, 25.0, 30.0, 22.0],
    "reward/length_correlation": [0.1, 0.2, 0.2, 0.3],
    "ppo/engine_gap": [0.01, 0.02, 0.01, 0.01],
    "heldout/reward": [0.5, 0.55, 0.6, 0.58],
    "reward/deviation": [3.0, 2.5, 2.0, 2.2],
    "ppo/first_ratio_deviation": [0.0, 0.0, 0.0, 0.0],
    "ppo/first_kl": [0.0],
}


@pytest.mark.parametrize("metric", HEALTHY)
def test_a_healthy_run_has_no_alarm(metric):
    assert find_alarms(rows(metric, HEALTHY[metric]), kl_stop=10.0) == []


@pytest.mark.parametrize(
    ("metric", "values", "step", "words"),
    [
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
        # from the start, so that nothing ever falls
        ("ppo/eos_rate", [0.0, 0.0, 0.0, 0.0], 1, "max_tokens"),
        ("ppo/eos_rate", [0.9, 0.9, 0.2, 0.1], 3, "max_tokens"),
        ("reward/deviation", [0.0, 0.0, 0.0], 1, "rewards do not vary"),
        ("reward/deviation", [2.0, 0.0, 0.0], 2, "rewards do not vary"),
        # no noise: once is enough
        ("ppo/first_ratio_deviation", [0.0, 0.03, 0.0, 0.0], 2, "compute differently"),
        ("ppo/first_kl", [0.02], 1, "policy and reference differ"),
    ],
)
def test_each_alarm_names_the_first_bad_step_a_cause_and_a_remedy(metric, values, step, words):
    (found,) = find_alarms(rows(metric, values), kl_stop=10.0)
    assert (found.name, found.step, found.value) == (metric, step, values[step - 1])
    assert words in f"{found.cause} {found.remedy}"
    assert found.cause
    assert found.remedy


def test_one_bad_value_is_noise_unless_it_is_the_last():
    assert find_alarms(rows("ppo/clip_fraction", [0.1, 0.5, 0.1, 0.1]), 10.0) == []
    assert [one.step for one in find_alarms(rows("ppo/clip_fraction", [0.1, 0.1, 0.5]), 10.0)] == [
        3
    ]


def test_a_run_without_metrics_has_no_alarm():
    assert find_alarms([], 10.0) == []
    assert find_alarms([{"step": 1.0, "train/loss": 3.0}], 10.0) == []
    assert {rule.metric for rule in list_rules(10.0)} == set(HEALTHY)


def test_a_run_of_one_iteration_is_told_what_is_wrong_from_the_start():
    assert [one.name for one in find_alarms(rows("ppo/eos_rate", [0.0]), 10.0)] == ["ppo/eos_rate"]
    assert [one.name for one in find_alarms(rows("reward/deviation", [0.0]), 10.0)] == [
        "reward/deviation"
    ]


def test_the_critic_is_not_blamed_for_rewards_that_do_not_vary():
    values = zip([0.0] * 6, [-277.0] * 6)
    flat = [
        {"step": float(step), "reward/deviation": deviation, "ppo/explained_variance": explained}
        for step, (deviation, explained) in enumerate(values, 1)
    ]
    assert [one.name for one in find_alarms(flat, 10.0)] == ["reward/deviation"]
    varied = [{**row, "reward/deviation": 1.0} for row in flat]
    assert [one.name for one in find_alarms(varied, 10.0)] == ["ppo/explained_variance"]


def test_each_precision_has_a_tolerance_of_its_own():
    between = rows("ppo/first_ratio_deviation", [1e-3, 1e-3])
    assert TOLERANCE["fp32"] < 1e-3 < TOLERANCE["bf16"]
    assert find_alarms(between, 10.0, "bf16") == []
    assert [one.name for one in find_alarms(between, 10.0, "fp32")] == ["ppo/first_ratio_deviation"]


def test_the_doctor_says_each_alarm_once_and_as_soon_as_it_is_one(capsys):
    def start(seen):
        doctor = Doctor(lambda: seen, 10.0, "bf16", Ranks.alone())
        doctor.on_start(TrainingState(None, None, Plan(max_steps=6), []))
        return doctor

    doctor, said = start([]), []
    for step, value in enumerate([0.9, 0.1, 0.9, 0.1, 0.1, 0.1], 1):
        doctor.on_log(step, {"ppo/eos_rate": value})
        said.append(capsys.readouterr().err)

    # one alone may be noise
    assert [bool(line) for line in said] == [False, False, False, False, True, False]
    assert said[4].startswith("alarm at step 4: most answers do not end: ")
    assert "(ppo/eos_rate 0.1); raise sample.max_tokens" in said[4]
    assert [one.step for one in doctor.report(finished=True)] == [4]

    resumed = start(doctor.rows[:5])  # what was said before is not said again

    for fraction in (0.1, 0.5, 0.5):
        resumed.on_log(6, {"ppo/eos_rate": 0.1, "ppo/clip_fraction": fraction})

    assert capsys.readouterr().err.startswith(
        "alarm at step 6: updates are too large: most of them are cut ("
    )
    assert [one.name for one in resumed.report(finished=True)] == [
        "ppo/clip_fraction",
        "ppo/eos_rate",
    ]
    assert capsys.readouterr().err == ""


def test_the_last_value_of_a_finished_run_counts_alone(capsys):
    doctor = Doctor(list, 10.0, "bf16", Ranks.alone())
    doctor.on_start(TrainingState(None, None, Plan(max_steps=2), []))
    doctor.on_log(1, {"ppo/clip_fraction": 0.1})
    doctor.on_log(2, {"ppo/clip_fraction": 0.5})
    assert capsys.readouterr().err == ""
    assert [one.step for one in doctor.report(finished=True)] == [2]
    assert "clip_fraction 0.5" in capsys.readouterr().err
