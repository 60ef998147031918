"""How long a recipe still takes: by the weights, by what is finished, and by what running steps say
of themselves."""

import os
import time
from itertools import pairwise

import pytest

from llama2.recipe.remaining import StepLog, StepProgress, estimate_remaining, read_share


def test_at_the_start_the_recipes_own_weights_count():
    assert estimate_remaining(300, [], [], 0) == 300
    assert estimate_remaining(200, [], [StepProgress(100, 0.0)], 0) == 300


def test_the_pace_is_that_of_finished_and_of_running_steps():
    assert estimate_remaining(100, [(100, 300)], [], 300) == pytest.approx(100 * 310 / 110)
    told = StepProgress(100, seconds=200, share=0.5, left=0.5)
    assert estimate_remaining(100, [], [told], 200) == pytest.approx(200 + 100 * 210 / 60)


def test_a_running_step_is_believed_about_itself():
    assert estimate_remaining(
        0, [(10, 10)], [StepProgress(10, seconds=100, share=0.25, left=0.75)], 110
    ) == pytest.approx(300)
    resumed = StepProgress(10, seconds=50, share=0.25, left=0.25)  # it began at one half
    assert estimate_remaining(0, [], [resumed], 50) == pytest.approx(50)
    begun = StepProgress(100, seconds=60, share=0.01, left=0.99)  # one line of many says little
    assert 100 < estimate_remaining(0, [], [begun], 60) < 60 * 99


def test_steps_side_by_side_share_the_time():
    both = [StepProgress(100, 50, 0.5, 0.5), StepProgress(100, 50, 0.5, 0.5)]
    assert estimate_remaining(0, [], both, 50) == pytest.approx(50)
    assert estimate_remaining(200, [], both, 50) == pytest.approx((100 + 200 * 110 / 110) / 2)
    alone = [StepProgress(100, 50, 0.1, 0.9), StepProgress(100, 50, 0.9, 0.1)]
    assert (
        estimate_remaining(0, [], alone, 50) >= 50 * 0.9 / 0.1 * 0.5
    )  # never sooner than the slower one


def test_it_never_stands_still():
    """Neither for a step that says nothing nor for one that has not spoken for long, nor long after
    the time given."""
    for running in (
        lambda t: StepProgress(60, float(t)),
        lambda t: StepProgress(60, 30, 0.5, 0.5, float(t)),
    ):
        told = [estimate_remaining(100, [(50, 70)], [running(t)], 70 + t) for t in range(600)]
        assert all(a != b for a, b in pairwise(told))
        assert told[10] < told[0]
        assert min(told) > 0


@pytest.mark.parametrize(
    ("line", "share"),
    [
        ("sft 20/80: ETA 1:00, loss 2.1, 900 tokens/s, MFU 97%", 0.25),
        ("pretrain 1,000/4,000: loss 1", 0.25),
        ("reading 25 %", 0.25),
        ("sampled 12.5% of the prompts", 0.125),
        ("ppo 3: loss 0.1, 9 tokens/s, MFU 97%", None),
        ("runs/v1/3/4: resuming", None),
        ("9 tokens/s", None),
        ("5/0", None),
        ("7/4 time", None),
        ("", None),
        ("asked http://host:80/1/2: 30/40", 0.75),
        ("runs/demo/rejection1: 7,000 of 28,000 answers, 3:20 left", 0.25),
    ],
)
def test_progress_is_read_from_a_line(line, share):
    assert read_share(line) == share


def test_the_newest_line_of_a_log_is_fit_for_a_terminal(tmp_path):
    (tmp_path / "log").write_text("")
    log = StepLog(tmp_path / "log", 0.0)
    (tmp_path / "log").write_text("one\nread \x1b[2J\u202efile\n")
    assert log.last_line() == r"read \x1b[2J\u202efile"


def test_a_log_tells_how_far_its_step_is(tmp_path):
    path = tmp_path / "log"
    path.write_text("sft 80/80: done\n")  # an earlier attempt
    begin = time.monotonic() - 100
    log = StepLog(path, begin)
    assert log.progress(7, begin + 30) == StepProgress(7, pytest.approx(30))
    assert log.last_line() == ""

    with path.open("a") as file:
        file.write("loading\nsft 20/80: loss 1\nsaved\n")

    log.progress(7, begin + 40)
    os.utime(path, (1, 1))  # the clock of files was set back
    assert log.progress(7, begin + 55) == StepProgress(
        7, pytest.approx(40), 0.25, 0.75, pytest.approx(15)
    )
    assert log.last_line() == "saved"


def test_a_resumed_step_is_judged_by_what_it_did_since(tmp_path):
    path = tmp_path / "log"
    begin = time.monotonic() - 100
    log = StepLog(path, begin)
    path.write_text("x: resuming\nsft 40/80: loss 1\n")
    assert log.progress(7, begin + 10) == StepProgress(7, 0.0, 0.0, 0.5, pytest.approx(0))
    path.write_text("x: resuming\nsft 40/80: loss 1\nsft 60/80: loss 1\n")
    assert log.progress(7, begin + 30) == StepProgress(
        7, pytest.approx(20), 0.25, 0.25, pytest.approx(0)
    )
