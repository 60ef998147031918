"""The progress that a stage reports while it samples."""

from types import SimpleNamespace

from llama2.ranks import Ranks
from llama2.stages.common import meter as module
from llama2.stages.common.meter import Meter


def test_progress_says_how_many_answers_and_how_long(monkeypatch, capsys):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(module.time, "monotonic", lambda: clock.now)
    meter = Meter("runs/rejection", Ranks.alone(), 28_000)
    meter.begin(8_000)  # found on the disk

    for seconds, done in ((5, 100), (20, 1_000), (25, 1_500)):
        clock.now = 100 + seconds
        meter(done, 2_000)

    # 50 a second
    assert capsys.readouterr().err == "runs/rejection: 9,000 of 28,000 answers, 6:20 left\n"
    clock.now = 140
    meter(0, 2_000)  # the next call of the same part: the one before is done
    assert capsys.readouterr().err == "runs/rejection: 10,000 of 28,000 answers, 6:00 left\n"
    meter.begin(12_000)
    clock.now = 160
    meter(500, 4_000)
    assert capsys.readouterr().err == "runs/rejection: 12,500 of 28,000 answers, 3:26 left\n"
