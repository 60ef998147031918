"""Section of the report on what it took: time, throughput, energy and carbon (§2.2.1, Table 2), and
what each step was made from."""

from __future__ import annotations

from typing import Any

from llama2.report import paper_values
from llama2.report.energy import Power, format_amounts, measure_energy
from llama2.report.html import Html, chip, clock, number, paragraph, percent, section, short, table
from llama2.runs.recipe_runs import Recipe, Step

HEADERS = (
    "Step",
    "Verb",
    "Made from",
    "Time",
    "Device-hours",
    "Energy",
    "CO₂eq",
    "Tokens/s",
    "MFU",
)


def render_costs(recipe: Recipe, power: Power) -> Html:
    """Render time, speed, energy and carbon of every step, and what it was made from."""
    seconds = hours = kwh = kg = 0.0
    for step in recipe.steps:
        energy = measure_energy(step, power)
        if energy is not None and step.seconds is not None:
            seconds += step.seconds
            hours += energy.hours
            kwh += energy.kwh
            kg += energy.kg

    total = [Html("<b>all steps</b>"), "", "", clock(seconds), number(hours)]
    rows = [_describe_step(step, power) for step in recipe.steps]
    rows.append([*total, *format_amounts(kwh, kg), "", ""])
    wall = clock(recipe.wall_seconds)
    devices = sorted({step.device for step in recipe.steps})
    return section(
        "costs",
        "§2.2.1",
        "Time, energy and carbon",
        paragraph(f"Wall-clock time {wall}; steps that ran side by side count once."),
        table(HEADERS, rows, words=(0, 1, 2)),
        paragraph(_describe_method(power, " and ".join(devices)), "note"),
        _render_table_2(hours, kg),
    )


def _describe_step(step: Step, power: Power) -> list[Any]:
    energy = measure_energy(step, power)
    time: list[Any] = [chip("unfinished", "bad"), "", "", ""]
    if energy is not None:
        amounts = format_amounts(energy.kwh, energy.kg)
        time = [clock(step.seconds), number(energy.hours), *amounts]

    speed, mfu = step.mean("perf/tokens_per_second"), step.mean("perf/mfu")
    return [step.name, step.verb, ", ".join(step.made_from), *time, short(speed), percent(mfu, 0)]


def _describe_method(power: Power, devices: str) -> str:
    return (
        f"The paper's method: device-hours x rated power x PUE {power.pue:g} x "
        f"{power.kg_per_kwh:g} kg/kWh, with {power.watts_per_core:g} W a CPU core and "
        f"{power.watts_per_gpu:g} W an accelerator (these runs: {devices}). Network, memory, "
        "cooling beyond the PUE and manufacturing are left out, as in the paper."
    )


def _render_table_2(hours: float, kg: float) -> Html:
    rows = [
        (size, f"{device_hours:,}", f"{watts}", f"{tonnes:,.2f}")
        for size, (device_hours, watts, tonnes) in paper_values.PRETRAINING.items()
    ]
    rows.append(("this recipe", number(hours), "", f"{kg / 1000:.2g}"))
    return table(("Table 2", "Device-hours", "Watts", "t CO₂eq"), rows)
