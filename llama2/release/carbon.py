"""Energy and carbon by the paper's method (§2.2.1, Table 2): device-hours x power x PUE x grid intensity.

The paper prints only its results. With a power usage effectiveness of 1.1 and 0.385 kg CO2eq a kWh this product gives
every row of Table 2. Like the paper's, the figure takes the rated power of the devices for granted, and leaves out
the rest of the machine, the network and manufacturing.
"""

from __future__ import annotations

from dataclasses import dataclass

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
    """What a piece of work took. `hours` are device-hours: cores or accelerators times wall-clock hours."""

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
