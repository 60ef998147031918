"""CARBON.md and carbon.json: the energy and the emissions of everything that a model was made from
(§2.2.1)."""

from __future__ import annotations

from typing import Any

from llama2.devices import CPU
from llama2.records import dump
from llama2.release import markdown as md
from llama2.release.lineage import Lineage, Stage
from llama2.release.measurements import Measured
from llama2.report import cost_sections
from llama2.report.carbon import Energy, Power, amounts

FILE, NUMBERS = "CARBON.md", "carbon.json"


def energy_of(stage: Stage, power: Power) -> Energy:
    """Device-hours and rated power of a finished stage."""
    found = cost_sections.energy_of(stage.step, power)
    return found or Energy(0.0, power.watts_per_core, power.pue, power.kg_per_kwh)


def total(lineage: Lineage, power: Power) -> tuple[float, float, float]:
    """Device-hours, kWh and kg CO2eq of all stages."""
    found = [energy_of(stage, power) for stage in lineage.stages]
    return (
        sum(one.hours for one in found),
        sum(one.kwh for one in found),
        sum(one.kg for one in found),
    )


def numbers(lineage: Lineage, power: Power) -> str:
    """carbon.json."""
    hours, kwh, kg = total(lineage, power)
    return dump(
        {
            "method": "device-hours x rated power x PUE x carbon intensity",
            "power": power.model_dump(),
            "total": _figures(hours, kwh, kg),
            "stages": {
                stage.name: {
                    "device": device_of(stage),
                    "devices": stage.step.devices,
                    "watts": one.watts,
                    **_figures(one.hours, one.kwh, one.kg),
                }
                for stage in lineage.stages
                for one in [energy_of(stage, power)]
            },
        }
    )


def _figures(hours: float, kwh: float, kg: float) -> dict[str, Any]:
    return {"device_hours": round(hours, 9), "kwh": round(kwh, 9), "kg_co2eq": round(kg, 9)}


def device_of(stage: Stage) -> str:
    """The kind of device a stage ran on: cpu, cuda, ..."""
    return stage.step.device


def document(lineage: Lineage, measured: Measured | None, power: Power) -> str:
    """CARBON.md."""
    rows = [_row(stage, energy_of(stage, power)) for stage in lineage.stages]
    hours, kwh, kg = total(lineage, power)
    kinds = sorted({device_of(stage) for stage in lineage.stages})
    missing = ", ".join(md.code(one.place) for _, one in lineage.bases)

    return md.document(
        "# Energy and carbon",
        f"Making this model took {duration(hours)} of device time, about {' and '.join(amounts(kwh, kg))} CO2eq.",
        "## Method",
        "The method of the Llama 2 paper (section 2.2.1): device-hours x rated power x PUE x carbon intensity. The "
        "hours are measured. The rest is assumed, not metered:",
        md.bullets(
            f"{power.watts_per_core:g} W a CPU core" if CPU in kinds else "",
            f"{power.watts_per_gpu:g} W an accelerator" if set(kinds) - {CPU} else "",
            f"a power usage effectiveness (PUE) of {power.pue:g}",
            f"{power.kg_per_kwh:g} kg CO2eq for each kWh",
        ),
        "Left out, as in the paper: the rest of the machine, the network, and manufacturing. Left out too: whatever "
        "was tried before this run, stages of the recipe that nothing here was made from, and attempts that were "
        "killed outright. Nothing is said about offsets.",
        "## Stages",
        md.table(
            ("Stage", "Device", "Devices", "Time", "Device-hours", "Energy", "CO2eq"),
            [
                *rows,
                (
                    "**all**",
                    "",
                    "",
                    "",
                    *(f"**{one}**" for one in (md.hours(hours), *amounts(kwh, kg))),
                ),
            ],
            (0, 1),
        ),
        f"Not counted: what it took to make {missing}, which came from outside." if missing else "",
        _evaluation(lineage, measured, power),
        f"The exact figures are in `{NUMBERS}`.",
    )


def _row(stage: Stage, energy: Energy) -> tuple[str, ...]:
    return (
        md.text(stage.name),
        device_of(stage),
        str(stage.step.devices),
        duration((stage.step.seconds or 0) / 3600),
        md.hours(energy.hours),
        *amounts(energy.kwh, energy.kg),
    )


def _evaluation(lineage: Lineage, measured: Measured | None, power: Power) -> str:
    energy = cost_sections.energy_of(measured.step, power) if measured is not None else None
    if energy is None:
        return ""

    return (
        f"Its evaluation, of all versions together, took {md.hours(energy.hours)} device-hours more "
        f"({', '.join(amounts(energy.kwh, energy.kg))} CO2eq), which the sum does not hold."
    )


def duration(hours: float) -> str:
    """Hours in words of a fitting size."""
    seconds = hours * 3600
    if seconds < 60:
        return f"{seconds:.1f} s"

    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{hours:,.1f} h"
