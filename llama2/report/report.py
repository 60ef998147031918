"""One self-contained HTML page about a recipe: whether each stage did its job, beside the paper's
own figures.

The page loads nothing from anywhere, reads in light and dark and on a phone, and is silent about
what is missing.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator

from llama2 import atomic, runs
from llama2.config import StageConfig
from llama2.report import (
    cost_sections,
    data_sections,
    evaluation_sections,
    ghost_section,
    html,
    reward_section,
    rlhf_sections,
    svg,
    training_sections,
)
from llama2.report.energy import Power
from llama2.report.targets import Targets, judge_recipe, render_judgements
from llama2.runs.recipe_runs import Recipe, read_recipe

PAGE = "report.html"


class Config(StageConfig):
    """Write a report about the runs of a recipe."""

    around = frozenset({"recipe"})
    # Text, not a path: a report may stand inside the recipe it reads, which would make it an input
    # of itself.
    recipe: Annotated[str, BeforeValidator(str)]
    """directory that holds the recipe's run directories"""
    after: tuple[Path, ...] = ()
    """runs that must be finished before the report is written; inside a recipe, its last ones"""
    title: str = ""
    """heading of the page; empty: the name of the directory"""
    targets: Targets = Targets()
    """what the summary calls reached"""
    power: Power = Power()
    """assumptions of energy and carbon"""


def run(config: Config, run: runs.Run) -> None:
    """Write report.html."""
    if not run.ranks.is_main:
        return

    file = run.path / PAGE
    atomic.write_atomic(file, render(read_recipe(Path(config.recipe)), config))
    print(f"report: {file.resolve().as_uri()}", file=sys.stderr)


def render(recipe: Recipe, config: Config) -> str:
    """Return the page about a recipe."""
    sections = [
        html.section(
            "summary",
            "",
            "Summary",
            render_judgements(judge_recipe(recipe, config.targets)),
            _render_warnings(recipe),
        ),
        data_sections.render_data(recipe),
        training_sections.render_pretraining(recipe),
        training_sections.render_fine_tuning(recipe),
        data_sections.render_preferences(recipe),
        reward_section.render_reward_models(recipe),
        rlhf_sections.render_rejection(recipe),
        rlhf_sections.render_ppo(recipe),
        ghost_section.render_ghost(recipe),
        evaluation_sections.render_versions(recipe),
        evaluation_sections.render_safety(recipe),
        evaluation_sections.render_distributions(recipe),
        evaluation_sections.render_conversations(recipe),
        cost_sections.render_costs(recipe, config.power),
    ]
    body = html.Html(svg.number_ids(html.join(sections)))
    title = config.title or f"Llama 2 recipe: {recipe.path.resolve().name}"
    return html.document(title, _describe_recipe(recipe), body)


def _render_warnings(recipe: Recipe) -> html.Html:
    """Render what makes a run worth less than its figures, in the run's own words."""
    rows = []
    for step in recipe.steps:
        rows += [(step.name, line) for line in step.warnings]

    if not rows:
        return html.Html("")

    lines = html.table(("Run", "What it warned of"), rows, words=(0, 1))
    return html.join([html.subtitle("Warnings"), lines])


def _describe_recipe(recipe: Recipe) -> str:
    """Say how much is finished, when the last step began, and with what code."""
    finished = sum(step.seconds is not None for step in recipe.steps)
    steps = len(recipe.steps) + recipe.waiting
    parts = [f"{finished} of {steps} steps finished in {html.clock(recipe.wall_seconds)}"]
    if newest := max(step.started for step in recipe.steps):
        time = newest.replace("T", " ").removesuffix(":00Z").removesuffix("Z")
        parts.append(f"{time} UTC")

    code = {step.code for step in recipe.steps if step.code is not None}
    if len(code) == 1:
        parts.append(f"code {code.pop()}")

    return " · ".join(parts)
