"""One self-contained HTML page about a recipe: whether each stage did its job, beside the paper's
own figures.

The page loads nothing from anywhere, reads in light and dark and on a phone, and is silent about
what is missing.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator

from llama2 import atomic, runs
from llama2.config import StageConfig
from llama2.report import charts, cost_sections, evaluation_sections, html, training_sections
from llama2.report import targets as verdicts
from llama2.report.carbon import Power
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
    targets: verdicts.Targets = verdicts.Targets()
    """what the summary calls reached"""
    power: Power = Power()
    """what energy and carbon are reckoned with"""


def run(config: Config, run: runs.Run) -> None:
    """Writes report.html."""
    if not run.ranks.is_main:
        return

    file = run.path / PAGE
    atomic.write_atomic(file, render(read_recipe(Path(config.recipe)), config))
    print(f"report: {file.resolve().as_uri()}", file=sys.stderr)


def render(recipe: Recipe, config: Config) -> str:
    """The page about a recipe."""
    name = config.title or f"Llama 2 recipe: {recipe.path.resolve().name}"
    sections = [
        html.section(
            "summary",
            "",
            "Summary",
            verdicts.render(verdicts.verdicts(recipe, config.targets)),
            _warnings(recipe),
        ),
        training_sections.data(recipe),
        training_sections.pretraining(recipe),
        training_sections.fine_tuning(recipe),
        training_sections.preferences(recipe),
        training_sections.reward_models(recipe),
        training_sections.rejection(recipe),
        training_sections.ppo(recipe),
        evaluation_sections.ghost(recipe),
        evaluation_sections.versions(recipe),
        evaluation_sections.safety(recipe),
        evaluation_sections.distributions(recipe),
        evaluation_sections.conversations(recipe),
        cost_sections.costs(recipe, config.power),
    ]
    body = html.Html(charts.number_ids(html.join(sections)))
    contents = re.findall(
        r'<section id="([\w-]+)"><h2>(?:<span[^>]*>[^<]*</span>)?([^<]*)</h2>', body
    )

    return html.document(name, _subtitle(recipe), contents, body)


def _warnings(recipe: Recipe) -> html.Html:
    """What makes a run worth less than its figures, in the run's own words."""
    rows = [(step.name, line) for step in recipe.steps for line in step.warnings]
    if not rows:
        return html.Html("")

    return html.join(
        [
            html.Html("<h3>Warnings</h3>"),
            html.table(("Run", "What it warned of"), rows, words=(0, 1)),
        ]
    )


def _subtitle(recipe: Recipe) -> str:
    finished = sum(step.seconds is not None for step in recipe.steps)
    newest = max((str(step.manifest.get("started", "")) for step in recipe.steps), default="")
    code = {str(step.manifest["code"]) for step in recipe.steps if "code" in step.manifest}
    parts = [
        f"{finished} of {len(recipe.steps) + recipe.waiting} steps finished in {html.clock(recipe.wall_seconds)}",
        newest.replace("T", " ").removesuffix(":00Z").removesuffix("Z") + " UTC" if newest else "",
        f"code {', '.join(sorted(code))}" if len(code) == 1 else "",
    ]

    return " · ".join(part for part in parts if part)
