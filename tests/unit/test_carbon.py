"""The carbon method against Table 2, row by row."""

from __future__ import annotations

import math

import pytest

from llama2.release import paper
from llama2.release.carbon import Energy


@pytest.mark.parametrize("size", paper.PRETRAINING)
def test_reproduces_table_2(size: str) -> None:
    hours, watts, tonnes = paper.PRETRAINING[size]
    # The paper cuts off after two decimals.
    assert math.floor(Energy(hours, watts).tonnes * 100) / 100 == tonnes


def test_units() -> None:
    energy = Energy(hours=10, watts=100, pue=1.0, kg_per_kwh=0.5)
    assert energy.kwh == pytest.approx(1.0)
    assert energy.kg == pytest.approx(0.5)
    assert energy.tonnes == pytest.approx(0.0005)
