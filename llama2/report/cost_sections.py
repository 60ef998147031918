"""Sections of the report on what it took: time, throughput, energy and carbon (§2.2.1, Table 2),
and the lineage."""

from __future__ import annotations

from collections.abc import Mapping

from llama2.devices import is_cpu
from llama2.report import paper_values
from llama2.report.carbon import Energy, Power, amounts
from llama2.report.html import Html, chip, clock, number, paragraph, percent, section, short, table
from llama2.runs.recipe_runs import Recipe, Step


def energy_of(step: Step, power: Power) -> Energy | None:
    """Device-hours and rated power of a finished step."""
    if step.seconds is None:
        return None

    watts = power.watts_per_core if is_cpu(step.device) else power.watts_per_gpu
    return Energy(step.devices * step.seconds / 3600, watts, power.pue, power.kg_per_kwh)


def costs(recipe: Recipe, power: Power) -> Html:
    """Time, speed, energy and carbon of every step, and what it was made from."""
    rows = []
    totals = {"seconds": 0.0, "hours": 0.0, "kwh": 0.0, "kg": 0.0}
    for step in recipe.steps:
        energy = energy_of(step, power)
        speed = step.series("perf/tokens_per_second")[1]
        mfu = step.series("perf/mfu")[1]
        rows.append(
            (
                step.name,
                step.verb,
                ", ".join(step.made_from),
                *_time(step, energy),
                short(sum(speed) / len(speed)) if speed else "",
                percent(sum(mfu) / len(mfu), 0) if mfu else "",
            )
        )

        if energy is not None and step.seconds is not None:
            for key, value in (
                ("seconds", step.seconds),
                ("hours", energy.hours),
                ("kwh", energy.kwh),
                ("kg", energy.kg),
            ):
                totals[key] += value

    rows.append(
        (
            Html("<b>all steps</b>"),
            "",
            "",
            clock(totals["seconds"]),
            number(totals["hours"]),
            *amounts(totals["kwh"], totals["kg"]),
            "",
            "",
        )
    )
    headers = (
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
    return section(
        "costs",
        "§2.2.1",
        "Time, energy and carbon",
        paragraph(
            f"Wall-clock time {clock(recipe.wall_seconds)}; steps that ran side by side count once."
        ),
        table(headers, rows, words=(0, 1, 2)),
        paragraph(_method(power, _machine(recipe)), "note"),
        _table_2(totals),
    )


def _time(step: Step, energy: Energy | None) -> tuple[str | Html, str, str, str]:
    if energy is None:
        return chip("unfinished", "bad"), "", "", ""

    return (clock(step.seconds), number(energy.hours), *amounts(energy.kwh, energy.kg))


def _machine(recipe: Recipe) -> str:
    return " and ".join(sorted({step.device for step in recipe.steps}))


def _method(power: Power, devices: str) -> str:
    return (
        f"The paper's method: device-hours x rated power x PUE {power.pue:g} x {power.kg_per_kwh:g} kg/kWh, with "
        f"{power.watts_per_core:g} W a CPU core and {power.watts_per_gpu:g} W an accelerator (these runs: "
        f"{devices}). Network, memory, cooling beyond the PUE and manufacturing are left out, as in the paper."
    )


def _table_2(totals: Mapping[str, float]) -> Html:
    rows = [
        (size, f"{hours:,}", f"{watts}", f"{tonnes:,.2f}")
        for size, (hours, watts, tonnes) in paper_values.PRETRAINING.items()
    ]
    rows.append(("this recipe", number(totals["hours"]), "", f"{totals['kg'] / 1000:.2g}"))
    return table(("Table 2", "Device-hours", "Watts", "t CO₂eq"), rows)
