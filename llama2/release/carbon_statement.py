"""CARBON.md and carbon.json: the energy and the emissions of everything that a model was made from
(§2.2.1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llama2.devices import CPU
from llama2.records import dump
from llama2.release import markdown as md
from llama2.release.lineage import Lineage, Stage
from llama2.release.measurements import Measured
from llama2.report.energy import Energy, Power, format_amounts, measure_energy

FILE, NUMBERS = "CARBON.md", "carbon.json"


def measure_stage(stage: Stage, power: Power) -> Energy:
    """Return device-hours and rated power of a finished stage."""
    energy = measure_energy(stage.step, power)
    return energy or Energy(0.0, power.watts_per_core, power.pue, power.kg_per_kwh)


def add_up(lineage: Lineage, power: Power) -> tuple[float, float, float]:
    """Return device-hours, kWh and kg CO2eq of all stages."""
    parts = [measure_stage(stage, power) for stage in lineage.stages]
    hours = sum(energy.hours for energy in parts)
    kwh = sum(energy.kwh for energy in parts)
    return hours, kwh, sum(energy.kg for energy in parts)


def write_numbers(lineage: Lineage, power: Power) -> str:
    """Write carbon.json."""
    stages = {}
    for stage in lineage.stages:
        energy = measure_stage(stage, power)
        stages[stage.name] = {
            "device": stage.step.device,
            "devices": stage.step.devices,
            "watts": energy.watts,
            **_figures(energy.hours, energy.kwh, energy.kg),
        }

    return dump(
        {
            "method": "device-hours x rated power x PUE x carbon intensity",
            "power": power.model_dump(),
            "total": _figures(*add_up(lineage, power)),
            "stages": stages,
        }
    )


def _figures(hours: float, kwh: float, kg: float) -> dict[str, Any]:
    return {"device_hours": round(hours, 9), "kwh": round(kwh, 9), "kg_co2eq": round(kg, 9)}


def document(lineage: Lineage, measured: Measured | None, power: Power) -> str:
    """Write CARBON.md."""
    hours, kwh, kg = add_up(lineage, power)
    devices = {stage.step.device for stage in lineage.stages}
    missing = ", ".join(md.code(source.place) for source in lineage.bases)

    return md.document(
        "# Energy and carbon",
        f"Making this model took {format_duration(hours)} of device time, about "
        f"{' and '.join(format_amounts(kwh, kg))} CO2eq.",
        "## Method",
        "The method of the Llama 2 paper (section 2.2.1): device-hours x rated power x PUE x "
        "carbon intensity. The hours are measured. The rest is assumed, not metered:",
        md.bullets(
            md.when(CPU in devices, f"{power.watts_per_core:g} W a CPU core"),
            md.when(devices - {CPU}, f"{power.watts_per_gpu:g} W an accelerator"),
            f"a power usage effectiveness (PUE) of {power.pue:g}",
            f"{power.kg_per_kwh:g} kg CO2eq for each kWh",
        ),
        "Left out, as in the paper: the rest of the machine, the network, and manufacturing. Left "
        "out too: whatever was tried before this run, stages of the recipe that nothing here was "
        "made from, and attempts that were killed outright. Nothing is said about offsets.",
        "## Stages",
        md.table(
            ("Stage", "Device", "Devices", "Time", "Device-hours", "Energy", "CO2eq"),
            _rows(lineage, power),
            (0, 1),
        ),
        md.when(missing, f"Not counted: what it took to make {missing}, which came from outside."),
        _evaluation(measured, power),
        f"The exact figures are in `{NUMBERS}`.",
    )


def _rows(lineage: Lineage, power: Power) -> list[Sequence[str]]:
    rows: list[Sequence[str]] = []
    for stage in lineage.stages:
        step, energy = stage.step, measure_stage(stage, power)
        time = format_duration((step.seconds or 0) / 3600)
        figures = (md.hours(energy.hours), *format_amounts(energy.kwh, energy.kg))
        rows.append((md.text(stage.name), step.device, str(step.devices), time, *figures))

    hours, kwh, kg = add_up(lineage, power)
    sums = [f"**{figure}**" for figure in (md.hours(hours), *format_amounts(kwh, kg))]
    return [*rows, ("**all**", "", "", "", *sums)]


def _evaluation(measured: Measured | None, power: Power) -> str:
    energy = measure_energy(measured.step, power) if measured is not None else None
    if energy is None:
        return ""

    return (
        f"Its evaluation, of all versions together, took {md.hours(energy.hours)} device-hours "
        f"more ({', '.join(format_amounts(energy.kwh, energy.kg))} CO2eq), which the sum does not "
        "hold."
    )


def format_duration(hours: float) -> str:
    """Format hours in a unit of fitting size."""
    seconds = hours * 3600
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{seconds / 60:.1f} min"

    return f"{hours:,.1f} h"
