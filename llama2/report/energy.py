"""Energy and carbon by the paper's method (§2.2.1, Table 2): device-hours x power x PUE x grid
intensity.

The paper prints only its results. With a power usage effectiveness of 1.1 and 0.385 kg CO2eq a kWh
this product gives every row of Table 2 and its total, all cut off after two decimals: the total is
that of the exact figures, a little more than the sum of the rows as printed. Like the paper's, the
figure takes the rated power of the devices for granted, and leaves out the rest of the machine, the
network and manufacturing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import Field

from llama2.config import Config as Section

if TYPE_CHECKING:  # `llama2 carbon` needs no runs, which load torch
    from llama2.runs.recipe_runs import Step

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
    """Energy and emissions of a piece of work."""

    hours: float
    """device-hours: cores or accelerators times wall-clock hours"""
    watts: float
    """rated power of one device"""
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
    """Assumptions of energy and carbon."""

    watts_per_core: float = Field(WATTS_PER_CORE, gt=0)
    """rated power of one CPU core"""
    watts_per_gpu: float = Field(WATTS_PER_GPU, gt=0)
    """rated power of one accelerator"""
    pue: float = Field(PUE, ge=1)
    """power usage effectiveness of the data centre"""
    kg_per_kwh: float = Field(KG_PER_KWH, ge=0)
    """carbon intensity of the grid, kg CO2eq per kWh"""


def measure_energy(step: Step, power: Power) -> Energy | None:
    """Return the device-hours of a step at the rated power of its devices, None while it is
    unfinished."""
    if step.seconds is None:
        return None

    watts = power.watts_per_core if step.on_cpu else power.watts_per_gpu
    return Energy(step.devices * step.seconds / 3600, watts, power.pue, power.kg_per_kwh)


def format_amounts(kwh: float, kg: float) -> tuple[str, str]:
    """Format energy and emissions in units that suit their size."""
    energy = f"{1000 * kwh:.3g} Wh" if kwh < 1 else f"{kwh:,.3g} kWh"
    emissions = f"{1000 * kg:.3g} g" if kg < 1 else f"{kg:,.3g} kg"
    return energy, emissions
