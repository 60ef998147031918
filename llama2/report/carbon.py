"""Energy and carbon by the paper's method (§2.2.1, Table 2): device-hours x power x PUE x grid
intensity.

The paper prints only its results. With a power usage effectiveness of 1.1 and 0.385 kg CO2eq a kWh
this product gives every row of Table 2 and its total, all cut off after two decimals: the total is
that of the exact figures, a little more than the sum of the rows as printed. Like the paper's, the
figure takes the rated power of the devices for granted, and leaves out the rest of the machine, the
network and manufacturing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pydantic import Field

from llama2.config import Config as Section
from llama2.report import paper_values

PUE = 1.1
"""energy of the data centre for each unit of energy of its devices"""
KG_PER_KWH = 0.385
"""carbon intensity of the grid, kg CO2eq per kWh"""
WATTS_PER_CORE = 5.0
"""rated power of one CPU core: server parts of 64 to 96 cores are rated 280 to 400 W"""
WATTS_PER_GPU = 400.0
"""rated power of one accelerator: an A100-80GB's, as in the paper"""


@dataclass(frozen=True)
class Energy:
    """What a piece of work took. `hours` are device-hours: cores or accelerators times wall-clock
    hours."""

    hours: float
    watts: float
    pue: float = PUE
    kg_per_kwh: float = KG_PER_KWH

    @property
    def kwh(self) -> float:
        """Energy drawn from the grid, kWh."""
        return self.hours * self.watts * self.pue / 1000

    @property
    def kg(self) -> float:
        """Emissions, kg CO2eq."""
        return self.kwh * self.kg_per_kwh

    @property
    def tonnes(self) -> float:
        """Emissions, tonnes CO2eq, the unit of Table 2."""
        return self.kg / 1000


class Power(Section):
    """What energy and carbon are reckoned with."""

    watts_per_core: float = Field(WATTS_PER_CORE, gt=0)
    """rated power of one CPU core"""
    watts_per_gpu: float = Field(WATTS_PER_GPU, gt=0)
    """rated power of one accelerator"""
    pue: float = Field(PUE, ge=1)
    """power usage effectiveness of the data centre"""
    kg_per_kwh: float = Field(KG_PER_KWH, ge=0)
    """carbon intensity of the grid, kg CO2eq per kWh"""


def amounts(kwh: float, kg: float) -> tuple[str, str]:
    """Energy and emissions in units that suit their size."""
    return (
        f"{1000 * kwh:.3g} Wh" if kwh < 1 else f"{kwh:,.3g} kWh",
        f"{1000 * kg:.3g} g" if kg < 1 else f"{kg:,.3g} kg",
    )


# ---- the command
# ----------------------------------------------------------------------------------------------------
class Config(Section):
    """Reckon energy and carbon; without hours, Table 2 of the paper once more."""

    hours: float | None = Field(None, ge=0)
    """device-hours: cores or accelerators times hours"""
    watts: float = Field(WATTS_PER_GPU, gt=0)
    """rated power of one device"""
    pue: float = Field(PUE, ge=1)
    """power usage effectiveness of the data centre"""
    kg_per_kwh: float = Field(KG_PER_KWH, ge=0)
    """carbon intensity of the grid, kg CO2eq per kWh"""


def run(config: Config) -> None:
    """Print the energy and the emissions of some device-hours, or the rows of Table 2."""
    if config.hours is None:
        print(table_2(config.pue, config.kg_per_kwh))
        return

    energy = Energy(config.hours, config.watts, config.pue, config.kg_per_kwh)
    print(
        f"{config.hours:,g} h x {config.watts:g} W x PUE {config.pue:g} = {energy.kwh:,.6g} kWh\n"
        f"{energy.kwh:,.6g} kWh x {config.kg_per_kwh:g} kg/kWh = {energy.kg:,.6g} kg CO2eq = {energy.tonnes:,.6g} t"
    )


def cut(tonnes: float) -> float:
    """As the paper prints tonnes: cut off after two decimals."""
    return math.floor(tonnes * 100) / 100


def table_2(pue: float = PUE, kg_per_kwh: float = KG_PER_KWH) -> str:
    """Table 2 with what is printed there beside what the formula gives, as text."""
    lines = [f"{'Llama 2':8}{'device-hours':>14}{'W':>6}{'t CO2eq':>10}{'printed':>10}"]
    rows = {
        size: (Energy(hours, watts, pue, kg_per_kwh), printed)
        for size, (hours, watts, printed) in paper_values.PRETRAINING.items()
    }
    for size, (energy, printed) in rows.items():
        lines.append(
            f"{size:8}{energy.hours:>14,.0f}{energy.watts:>6.0f}{cut(energy.tonnes):>10.2f}{printed:>10.2f}"
        )

    hours, tonnes = (
        sum(getattr(energy, name) for energy, _ in rows.values()) for name in ("hours", "tonnes")
    )
    printed = paper_values.PRETRAINING_TOTAL[1]
    return "\n".join(
        [*lines, f"{'total':8}{hours:>14,.0f}{'':6}{cut(tonnes):>10.2f}{printed:>10.2f}"]
    )
