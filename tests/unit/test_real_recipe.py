"""The recipe on a real model: every size of it is a plan, its data is read in every format, and what is
listed of the data is what it reads."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import yaml
from commands import llama2
from made_up_data import make_data

from llama2 import records
from llama2.config import parse
from llama2.recipe import pipeline
from llama2.records import Dialog, Preference, Prompt
from llama2.stages.common.planning import Cluster, PlannedRuns

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "real" / "recipe.yaml"
SCALES = ("small", "full", "large")
PREPARED = ("evaluation", "preferences", "halves", "adversarial", "dialogs", "prompts")
MINUTES = {"small": (4, 20), "full": (50, 90), "large": (150, 400)}

sys.path.insert(0, str(ROOT / "tools"))
import real_data as listing  # noqa: E402


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


def find_paths() -> set[str]:
    """What the recipe names below the directory of the data."""
    return set(re.findall(r"\$\{data\}/([^'\"}, ]+)", RECIPE.read_text()))


@pytest.mark.parametrize("scale", SCALES)
def test_each_scale_is_a_plan_with_its_minutes(tmp_path, base, data, scale):
    flags = ["--parameters.data", str(data), "--parameters.model", str(base)]
    flags += ["--parameters.scale", scale, "--out", str(tmp_path / "run")]
    recipe = parse(pipeline.Config, [str(RECIPE), *flags], "llama2 run")
    found = pipeline.plan(recipe, Cluster(), PlannedRuns())
    least, most = MINUTES[scale]
    assert least <= found["total"]["minutes"] <= most
    assert all("seconds" in plan for plan in found["plan"].values())

    steps = pipeline.resolve_steps(recipe)
    pipeline.check_inputs(recipe, steps)  # the made-up directory has every file
    judges = {steps[name].out for name in ("judge_helpful", "judge_safe")}
    optimised = {steps[name].out for name in ("helpful", "safe")}
    assert set(steps["v3_candidate"].config.rewards.paths()) == optimised
    assert set(steps["v3_candidate"].config.judge.paths()) == judges


def test_all_that_is_missing_is_named_at_once(tmp_path, base, one_line):
    words = ["run", RECIPE, "--parameters.data", tmp_path / "none", "--parameters.model", base]
    heard = one_line(*words, "--out", tmp_path / "run")
    count, names = heard.split(" inputs are missing below ")
    assert int(count) == len(find_paths())
    place, names = names.removesuffix("; check the paths, or run the stages that make them").split(
        ": "
    )
    assert place == str(tmp_path / "none")
    assert set(names.split(", ")) == find_paths()
    assert not (tmp_path / "run").exists()


def test_no_question_is_both_learnt_and_measured(tmp_path, base, data):
    """What is held out, what judges learn and what reward models learn share no question, and
    nothing that is learnt opens like a prompt of the evaluation."""
    words = ["run", RECIPE, "--parameters.data", data, "--parameters.model", base]
    for step in PREPARED:
        assert llama2(*words, "--out", tmp_path / "run", "--step", step) == 0

    def ask(name: str, kind: type) -> set[str]:
        found = records.read(kind, tmp_path / "run" / name)
        turns = [item.prompt if kind is Preference else item.messages for item in found]
        return {next(t.content for t in messages if t.role == "user") for messages in turns}

    heldout = ask("preferences/heldout-preferences.jsonl", Preference)
    judged = ask("halves/heldout-preferences.jsonl", Preference)
    judged |= ask("adversarial/preferences.jsonl", Preference)
    learnt = ask("halves/preferences.jsonl", Preference)
    said = ask("dialogs/dialogs.jsonl", Dialog) | ask("prompts/prompts.jsonl", Prompt)
    evaluation = ask("evaluation/prompts.jsonl", Prompt)
    assert all((heldout, judged, learnt, said, evaluation))
    assert not heldout & (judged | learnt | said)
    assert not judged & learnt
    assert not evaluation & (heldout | judged | learnt | said)

    sources = {
        item.metadata["source"]
        for item in records.read(Prompt, tmp_path / "run/prompts/prompts.jsonl")
    }
    given = yaml.safe_load(RECIPE.read_text())["steps"]["prompts"]["sources"]
    assert sources == set(given)


def test_every_source_states_its_licence():
    steps = yaml.safe_load(RECIPE.read_text())["steps"]
    listed = {item.path: item.licence for item in listing.read_list()}
    for name in PREPARED:
        for source in steps[name]["sources"].values():
            path = source["path"].removeprefix("${data}/")
            if path == source["path"]:
                continue  # what an earlier step has made

            of_files = {licence for file, licence in listed.items() if file.startswith(path)}
            assert of_files == {source["license"]}


def test_the_list_has_every_file_that_the_recipe_reads_and_no_other():
    paths = [item.path for item in listing.read_list()]
    assert len(set(paths)) == len(paths)
    for path in find_paths():
        assert any(file.startswith(path) for file in paths), path
    for file in paths:
        assert any(file.startswith(path) for path in find_paths()), file


def test_the_documents_have_the_list():
    assert listing.format_table() in (ROOT / "docs" / "data.md").read_text()


def test_files_are_checked_against_the_list(tmp_path, data, capsys):
    faults = listing.check(data)
    assert len(faults) == len(listing.read_list())  # made up, so none is the listed one
    assert sum("missing; it comes from github.com/" in fault for fault in faults) == 2
    assert listing.main(["check", str(data)]) == 1
    assert listing.main(["check"]) == 2
    capsys.readouterr()
