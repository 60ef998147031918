"""Sizes of one recipe: what the value of a parameter changes in its steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import llama2

from llama2.config import parse
from llama2.errors import UserError
from llama2.recipe import pipeline
from llama2.recipe.config import Config
from llama2.stages.common.planning import Cluster, PlannedRuns

RECIPE: dict[str, Any] = {
    "parameters": {"size": "full", "seed": 3},
    "variants": {
        "size": {
            "small": {"steps": {"w": {"scale": 0.001, "seconds": 30}, "more": None}},
            "full": {},
            "large": {"steps": {"w": {"scale": 0.9}, "late": {"verb": "world"}}},
        }
    },
    "steps": {
        "w": {"verb": "world", "cores": 1, "seconds": 90, "scale": 0.5, "seed": "${seed}"},
        "more": {"verb": "world", "cores": 1, "seconds": 30},
    },
}


def read(tmp_path: Path, *flags: str, **changed: Any) -> Config:
    file = tmp_path / "recipe.yaml"
    file.write_text(
        yaml.safe_dump({"out": str(tmp_path / "run"), **RECIPE, **changed}, sort_keys=False)
    )
    return parse(Config, [str(file), *flags], "llama2 run")


@pytest.mark.parametrize(
    ("flags", "scale", "names"),
    [
        ((), 0.5, ["w", "more"]),
        (("--parameters.size", "small"), 0.001, ["w"]),
        (("--parameters.size", "large"), 0.9, ["w", "more", "late"]),
        # a flag lies upon the variant
        (("--parameters.size", "small", "--steps.w.scale", "0.7"), 0.7, ["w"]),
        (("--parameters.size", "large", "--steps.late.cores", "1"), 0.9, ["w", "more", "late"]),
    ],
)
def test_a_parameter_chooses_what_changes(tmp_path, flags, scale, names):
    steps = pipeline.resolve_steps(read(tmp_path, *flags))
    assert list(steps) == names
    assert (steps["w"].config.scale, steps["w"].config.seed) == (scale, 3)


def test_another_recipe_may_choose(tmp_path):
    over = tmp_path / "over.yaml"
    over.write_text("parameters: {size: small}\nsteps: {w: {scale: 0.3}}\n")
    recipe = read(tmp_path)
    recipe = parse(Config, [str(tmp_path / "recipe.yaml"), str(over)], "llama2 run")
    steps = pipeline.resolve_steps(recipe)
    assert list(steps) == ["w"]
    assert steps["w"].config.scale == 0.3  # what lies upon a recipe lies upon its variants
    assert steps["w"].keys.seconds == 30


@pytest.mark.parametrize(
    ("flags", "changed", "refusal"),
    [
        (("--parameters.size", "smal"), {}, "no variant of this recipe is called 'smal'; did you"),
        ((), {"parameters": {"seed": 3}}, "parameters.size: no variant .* called 'None'"),
        ((), {"variants": {"size": {"full": {"steps": {"v": {"scale": 1}}}}}}, "steps.v: there is"),
        ((), {"variants": {"size": 3}}, "variants.size"),
        ((), {"variants": {"size": {"full": {"stepz": {}}}}}, "stepz"),
    ],
)
def test_mistakes_are_named(tmp_path, flags, changed, refusal):
    with pytest.raises(UserError, match=refusal):
        read(tmp_path, *flags, **changed)


def test_a_plan_adds_up_the_minutes_of_the_chosen_size(tmp_path):
    """Steps that take one of two cores run two at a time."""
    for flags, seconds, minutes in (((), 90, 1.0), (("--parameters.size", "small"), 30, 0.2)):
        found = pipeline.plan(read(tmp_path, *flags, cores=2), Cluster(), PlannedRuns())
        assert found["total"]["minutes"] == minutes
        assert found["plan"]["w"]["seconds"] == seconds


def test_the_recipe_written_beside_the_runs_is_the_one_that_ran(tmp_path):
    read(tmp_path)
    words = [tmp_path / "recipe.yaml", "--parameters.size", "small"]
    assert llama2("run", *words) == 0
    written = yaml.safe_load((tmp_path / "run/recipe.yaml").read_text())
    assert "variants" not in written
    assert (written["parameters"], list(written["steps"])) == ({"seed": 3}, ["w"])
    assert llama2("run", tmp_path / "run/recipe.yaml") == 0  # nothing is left to do
