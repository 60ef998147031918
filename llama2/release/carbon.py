"""The command `llama2 carbon`: energy and carbon of device-hours, or Table 2 once more (§2.2.1)."""

from __future__ import annotations

import math

from pydantic import Field

from llama2.config import Config as Section
from llama2.report import paper_values
from llama2.report.energy import KG_PER_KWH, PUE, WATTS_PER_GPU, Energy


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
        print(format_table_2(config.pue, config.kg_per_kwh))
        return

    energy = Energy(config.hours, config.watts, config.pue, config.kg_per_kwh)
    print(
        f"{config.hours:,g} h x {config.watts:g} W x PUE {config.pue:g} = {energy.kwh:,.6g} kWh\n"
        f"{energy.kwh:,.6g} kWh x {config.kg_per_kwh:g} kg/kWh = {energy.kg:,.6g} kg CO2eq = "
        f"{energy.tonnes:,.6g} t"
    )


def truncate(tonnes: float) -> float:
    """Cut tonnes off after two decimals, as the paper prints them."""
    return math.floor(tonnes * 100) / 100


def format_table_2(pue: float = PUE, kg_per_kwh: float = KG_PER_KWH) -> str:
    """Format Table 2 as text: what is printed there beside what the formula gives."""
    lines = [f"{'Llama 2':8}{'device-hours':>14}{'W':>6}{'t CO2eq':>10}{'printed':>10}"]
    total_hours = total_tonnes = 0.0
    for size, (hours, watts, printed) in paper_values.PRETRAINING.items():
        tonnes = Energy(hours, watts, pue, kg_per_kwh).tonnes
        total_hours += hours
        total_tonnes += tonnes
        lines.append(
            f"{size:8}{hours:>14,.0f}{watts:>6.0f}{truncate(tonnes):>10.2f}{printed:>10.2f}"
        )

    printed = paper_values.PRETRAINING_TOTAL[1]
    lines.append(
        f"{'total':8}{total_hours:>14,.0f}{'':6}{truncate(total_tonnes):>10.2f}{printed:>10.2f}"
    )
    return "\n".join(lines)
