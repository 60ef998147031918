"""The carbon method against Table 2, row by row."""

from __future__ import annotations

import math

import pytest
from commands import llama2

from llama2.release.carbon import truncate
from llama2.report import paper_values
from llama2.report.energy import Energy

TABLE_2 = [
    ("7B", 184_320, 400, 31.22),
    ("13B", 368_640, 400, 62.44),
    ("34B", 1_038_336, 350, 153.90),
    ("70B", 1_720_320, 400, 291.42),
]


@pytest.mark.parametrize(("size", "hours", "watts", "tonnes"), TABLE_2)
def test_reproduces_table_2(size: str, hours: int, watts: int, tonnes: float) -> None:
    # The paper cuts off after two decimals.
    assert truncate(Energy(hours, watts).tonnes) == tonnes
    assert paper_values.PRETRAINING[size] == (hours, watts, tonnes)


def test_reproduces_the_total_of_table_2() -> None:
    assert len(TABLE_2) == len(paper_values.PRETRAINING)
    assert (
        sum(hours for _, hours, _, _ in TABLE_2) == 3_311_616 == paper_values.PRETRAINING_TOTAL[0]
    )
    # 539.00 is the sum of the exact figures, cut off; the rows as they are printed come to less
    assert (
        truncate(math.fsum(Energy(hours, watts).tonnes for _, hours, watts, _ in TABLE_2)) == 539.00
    )
    assert paper_values.PRETRAINING_TOTAL[1] == 539.00
    assert math.fsum(tonnes for *_, tonnes in TABLE_2) == pytest.approx(538.98)


def test_a_command_reckons(capsys: pytest.CaptureFixture[str]) -> None:
    assert llama2("carbon", "--hours", 1000, "--watts", 350, "--pue", 1.2, "--kg-per-kwh", 0.1) == 0
    said = capsys.readouterr().out
    assert "= 420 kWh" in said
    assert "= 42 kg CO2eq = 0.042 t" in said


def test_without_hours_the_command_gives_table_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert llama2("carbon") == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert (
        [row[-2] for row in rows]
        == [row[-1] for row in rows]
        == ["31.22", "62.44", "153.90", "291.42", "539.00"]
    )


def test_hours_cannot_be_negative(one_line) -> None:
    assert "hours" in one_line("carbon", "--hours", -1)


def test_units() -> None:
    energy = Energy(hours=10, watts=100, pue=1.0, kg_per_kwh=0.5)
    assert energy.kwh == pytest.approx(1.0)
    assert energy.kg == pytest.approx(0.5)
    assert energy.tonnes == pytest.approx(0.0005)
