"""What a run is warned of: the figures in a caution are those that would mend it."""

import json
import math
import re

import pytest

from llama2.config import StageConfig
from llama2.runs import open_run, read_warnings
from llama2.stages.common import cautions
from llama2.stages.common.training import Training
from llama2.train.loop import Plan


def heard(limit, items, batch_size, epochs):
    steps = epochs * math.ceil(items / batch_size)
    return list(
        cautions.warn_of_length(Plan(max_steps=limit), steps, items, "row", batch_size, epochs)
    )


def test_two_updates_are_few_and_the_batch_named_gives_enough():
    (line,) = heard(None, 35, 64, 2)
    assert line == (
        "2 updates from 35 rows in 2 epochs: fewer than 50 teach little; "
        "--batch-size 1 would give 70"
    )
    (line,) = heard(None, 257, 512, 1)
    assert line == (
        "1 update from 257 rows in 1 epoch: fewer than 50 teach little; --batch-size 5 would give 52"
    )
    (line,) = heard(None, 7, 64, 2)
    assert line.endswith("--batch-size 1 --epochs 8 would give 56")


@pytest.mark.parametrize("items", [1, 3, 26, 49, 51, 400])
@pytest.mark.parametrize("epochs", [1, 2, 3])
def test_the_cure_is_no_more_than_needed(items, epochs):
    for line in heard(None, items, 512, epochs):
        batch_size = int(re.search(r"--batch-size (\d+)", line)[1])
        passes = int((re.search(r"--epochs (\d+)", line) or [0, epochs])[1])
        given = passes * math.ceil(items / batch_size)
        assert line.endswith(f"would give {given}")
        assert given >= 50
        assert heard(None, items, batch_size, passes) == []

        if batch_size > 1:
            assert heard(None, items, batch_size + 1, passes)


def test_enough_updates_or_few_by_choice_are_nothing_to_warn_of():
    assert heard(None, 50, 1, 1) == []
    assert heard(8, 50, 4, 1) == []
    assert heard(8, 8, 1, 1) == []


def test_more_steps_than_the_data_has_are_named():
    (line,) = heard(1000, 400, 4, 2)
    assert line == (
        "max_steps 1,000 is more than the 200 updates of 2 epochs: training and its schedule end there; "
        "--epochs 10 would be enough"
    )


def test_a_schedule_that_never_reaches_its_peak():
    (line,) = cautions.warn_of_schedule(Plan(schedule="constant", warmup_steps=2000, max_steps=40))
    assert line == (
        "the learning rate rises to 2% of its peak and no further: warm-up takes 2,000 updates, the run "
        "has 40; lower --training.plan.warmup-steps"
    )
    for plan in (
        Plan(schedule="constant", warmup_steps=40, max_steps=40),
        Plan(max_steps=1),
        Plan(),
    ):
        assert list(cautions.warn_of_schedule(plan)) == []

    assert Plan(schedule="constant", warmup_steps=40, max_steps=40).scale_rate(39) == 1


def test_a_warm_up_that_leaves_nothing_of_the_schedule_is_one_line(tmp_path, base, world, one_line):
    """Refused, not warned of and refused."""
    said = one_line(
        "sft",
        "--model",
        base,
        "--dialogs.all.path",
        world / "demonstrations.jsonl",
        "--sequence-length",
        192,
        "--batch-size",
        64,
        "--training.plan.warmup-steps",
        2000,
        "--out",
        tmp_path / "out",
    )
    assert said.startswith("warmup_steps 2000 leaves nothing of a schedule of ")
    assert said.endswith(" steps; lower --training.plan.warmup-steps")


def test_a_limit_never_lengthens_a_run():
    assert Training(plan=Plan(max_steps=7)).with_steps(500).plan.max_steps == 7
    assert Training(plan=Plan(max_steps=700)).with_steps(500).plan.max_steps == 500
    assert Training().with_steps(500).plan.max_steps == 500


def test_warnings_are_said_once_and_kept_and_a_warned_user_may_still_change_things(
    tmp_path, capsys
):
    def attempt(seed: int, end: bool) -> None:
        with open_run("world", StageConfig(out=tmp_path / "run", seed=seed)) as run:
            for line in ("few updates", "no end", "few updates"):
                run.warn(line)

            if not end:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        attempt(0, end=False)

    attempt(1, end=True)
    assert read_warnings(tmp_path / "run") == ["few updates", "no end"]
    said = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert said == [f"{tmp_path}/run: warning: {line}" for line in ("few updates", "no end")] * 2
    assert json.loads((tmp_path / "run/COMPLETE").read_text())["outputs"] == {}


def test_what_an_attempt_that_was_given_up_was_warned_of_is_forgotten(tmp_path):
    def attempt(seed: int) -> None:
        with open_run("world", StageConfig(out=tmp_path / "run", seed=seed)) as run:
            if seed == 0:
                run.warn("few updates")
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        attempt(0)

    assert read_warnings(tmp_path / "run") == ["few updates"]
    attempt(1)
    assert read_warnings(tmp_path / "run") == []


def test_a_run_ends_with_its_counts_and_what_it_came_to(tmp_path, capsys):
    with open_run("world", StageConfig(out=tmp_path / "run")) as run:
        run.conclude("right on 60 %")
        tally = run.tally("pairs")
        tally.read, tally.kept = 5, 4
        tally.skip("too long", "raise --max-tokens")
        assert capsys.readouterr().err == ""

    assert capsys.readouterr().err.splitlines() == [
        f"{tmp_path}/run: pairs: read 5, kept 4, left out 1: too long 1 (raise --max-tokens)",
        f"{tmp_path}/run: right on 60 %",
    ]
    assert read_warnings(tmp_path / "run") == []
