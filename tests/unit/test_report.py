"""The report page: complete, self-contained, safe against model text, silent about what is missing."""

from __future__ import annotations

import json
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from recipe_directory import EVIL, make

from llama2.config import build
from llama2.errors import UserError
from llama2.release import report
from llama2.release.figures import Series, lines
from llama2.release.page import clock, esc, number, percent, short
from llama2.release.steps import read_recipe
from llama2.release.verdicts import Targets, verdicts
from llama2.runs import open_run

VOID = {"meta", "br", "img", "link", "use", "path", "image"}


class Checker(HTMLParser):
    """Collects tags and attributes and insists that every tag is closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.ids: list[str] = []
        self.attributes: list[tuple[str, str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.ids += [value or "" for name, value in attrs if name == "id"]
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("runs") / "demo")


@pytest.fixture(scope="module")
def page(recipe: Path) -> str:
    config = build(report.Config, {"out": recipe.parent / "report", "recipe": str(recipe), "targets": {"minutes": 10}})
    with open_run("report", config) as run:
        report.run(config, run)
    return (config.out / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def checked(page: str) -> Checker:
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    return checker


def test_every_section_is_there_in_the_order_of_the_paper(page: str) -> None:
    assert re.findall(r'<section id="([\w-]+)">', page) == [
        "summary", "data", "pretraining", "sft", "preferences", "reward", "rejection", "ppo", "ghost", "versions",
        "safety", "distributions", "conversations", "costs"]


def test_every_link_of_the_contents_leads_somewhere(page: str, checked: Checker) -> None:
    targets = re.findall(r'<nav>.*?</nav>', page, re.DOTALL)[0]
    assert set(re.findall(r'href="#([\w-]+)"', targets)) <= set(checked.ids)


def test_page_loads_nothing(checked: Checker) -> None:
    assert checked.tags.isdisjoint({"script", "link", "iframe", "img", "base", "form"})
    for name, value in checked.attributes:
        assert not re.match(r"(https?:)?//", value) or name.startswith("xmlns"), (name, value)
        if name in ("href", "xlink:href", "src"):
            assert value.startswith(("#", "data:image/png;base64,")), (name, value[:60])
        assert not name.startswith("on")


def test_model_text_stays_text(page: str) -> None:
    assert EVIL not in page
    assert str(esc(EVIL)) in page
    assert "<b>bold" not in page


def test_ids_are_unique_and_references_resolve(page: str, checked: Checker) -> None:
    assert len(checked.ids) == len(set(checked.ids))
    referenced = set(re.findall(r"url\(#([\w.-]+)\)", page)) | set(re.findall(r'href="#([\w.-]+)"', page))
    assert referenced <= set(checked.ids)


def test_colours_come_from_the_page_so_that_dark_works(page: str) -> None:
    charts = "".join(re.findall(r'<svg class="chart".*?</svg>', page, re.DOTALL))
    assert charts.count("var(--s1)") > 20
    assert re.findall(r"#[0-9a-f]{6}\b", charts) == []


def test_paper_stands_beside_ours(page: str) -> None:
    for figure in ("80.7\u00a0%", "94.3\u00a0%", "291.42", "Figure 11", "Figure 20", "Table 30", "Figure 10",
                   "Table 8"):
        assert figure in page, figure


def test_rejected_version_is_named_with_its_reason(page: str) -> None:
    assert page.count("not kept") >= 2  # in the table of versions and in that of candidates
    assert "it lost on held-out prompts" in page
    assert "raise beta" in page


def test_verdicts(recipe: Path) -> None:
    found = {verdict.what: verdict for verdict in verdicts(read_recipe(recipe), Targets(minutes=10))}
    assert found["Helpfulness, SFT → V2"].good  # V3 was not kept
    assert found["Violations, SFT → V2"].good
    assert found["Reward model reward-helpful, by degree of preference"].good
    assert not found["Reward model reward-safe, by degree of preference"].good
    assert found["Held-out text, bits per byte (pretrain)"].good
    assert found["Instruction obeyed at turns 2/4/6"].good
    assert not found["Time for the whole recipe"].good
    strict = Targets(helpfulness_gain=0.9, win_rate=1.0, violation_factor=1e6)
    bad = {verdict.what for verdict in verdicts(read_recipe(recipe), strict) if not verdict.good}
    assert {"Helpfulness, SFT → V2", "Violations, SFT → V2", "Win rate of V2 against SFT, ties removed"} <= bad


def test_real_data_is_judged_by_what_it_can_show(tmp_path: Path) -> None:
    root = make(tmp_path / "real", truth=False)
    found = {verdict.what for verdict in verdicts(read_recipe(root), Targets())}
    assert found == {"Reward model reward-helpful on held-out human pairs",
                     "Reward model reward-safe on held-out human pairs", "Held-out text, bits per byte (pretrain)"}


def test_drop_below_predecessor_is_found(tmp_path: Path) -> None:
    root = make(tmp_path / "demo")
    path = root / "evaluate" / "evaluation.json"
    evaluation = json.loads(path.read_text())
    for row in evaluation["win_rates"]:
        if (row["version"], row["axis"], row["judge"], row["against"]) == ("V2", "helpful", "truth", "SFT"):
            row["rate"] = 0.6
    path.write_text(json.dumps(evaluation))
    verdict = next(v for v in verdicts(read_recipe(root), Targets()) if v.what.startswith("No kept version"))
    assert not verdict.good
    assert "V2, helpfulness" in verdict.reached


def test_lineage_and_times(recipe: Path, tmp_path: Path) -> None:
    steps = {step.name: step for step in read_recipe(recipe).steps}
    assert steps["rejection"].made_from == ("sft", "reward-helpful")
    assert steps["v1"].made_from == ("pretrain", "rejection")
    assert "report" not in steps
    assert read_recipe(recipe).wall_seconds == pytest.approx(sum(step.seconds or 0 for step in steps.values()))
    moved = tmp_path / "elsewhere" / "demo"
    shutil.copytree(recipe, moved)
    assert {step.name: step.made_from for step in read_recipe(moved).steps} == {
        name: step.made_from for name, step in steps.items()}


def test_steps_side_by_side_count_once(tmp_path: Path) -> None:
    for name, begin, seconds in (("a", "00:00:00", 60), ("b", "00:00:30", 60), ("c", "00:10:00", 5)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text(json.dumps(
            {"verb": "sft", "started": f"2026-01-01T{begin}Z"}))
        (tmp_path / name / "COMPLETE").write_text(json.dumps({"outputs": {}, "seconds": seconds}))
    recipe = read_recipe(tmp_path)
    assert [step.name for step in recipe.steps] == ["a", "b", "c"]
    assert recipe.wall_seconds == 95


@pytest.mark.parametrize("kept", ["pretrain", "sft", "collect", "reward-safe", "rejection", "ppo", "ghost", "evaluate"])
def test_each_step_alone_makes_a_page(recipe: Path, tmp_path: Path, kept: str) -> None:
    shutil.copytree(recipe / kept, tmp_path / "part" / kept)
    (tmp_path / "part" / kept / "COMPLETE").unlink()
    config = build(report.Config, {"out": tmp_path / "out", "recipe": str(tmp_path / "part")})
    page = report.render(read_recipe(tmp_path / "part"), config)
    assert "unfinished" in page
    assert len(re.findall("<section ", page)) >= 2


def test_bare_manifests_make_a_page(tmp_path: Path) -> None:
    for verb in ("clean", "tokenize", "pretrain", "sft", "collect", "reward", "rejection", "ghost", "distill", "ppo",
                 "select", "evaluate"):
        (tmp_path / verb).mkdir()
        (tmp_path / verb / "manifest.json").write_text(json.dumps({"verb": verb}))
    page = report.render(read_recipe(tmp_path), build(report.Config, {"out": tmp_path / "o", "recipe": str(tmp_path)}))
    assert page.count("unfinished") == 12


@pytest.mark.parametrize(("prepare", "message"), [
    (lambda root: None, "holds no run"),
    (lambda root: shutil.rmtree(root), "no such directory"),
    (lambda root: (root / "steps.json").write_text("{"), "steps.json: not valid JSON"),
])
def test_mistakes_are_named(tmp_path: Path, prepare: object, message: str) -> None:
    root = tmp_path / "recipe"
    root.mkdir()
    prepare(root)  # type: ignore[operator]
    with pytest.raises(UserError, match=message):
        read_recipe(root)


def test_missing_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"pip install 'llama2\[report\]'"):
        lines([Series("a", [1, 2], [1, 2])], "x", "y")


def test_names_with_dollars_and_markup_are_drawn_as_they_are() -> None:
    drawn = lines([Series("a $x$ <b>", [1, 2], [1, 2]), Series("c", [1, 2], [2, 1])], "cost $", "")
    assert "a $x$ &lt;b&gt;" in drawn


def test_numbers() -> None:
    assert [percent(0.1234), percent(None), percent(0.5, 0)] == ["12.3\u00a0%", "", "50\u00a0%"]
    assert [number(1234.0), number(0.12345), number(None), number(12345.6)] == ["1,234", "0.123", "", "12,346"]
    assert [short(1_070_000), short(950), short(2e12)] == ["1.07M", "950", "2T"]
    assert [clock(3.21), clock(75), clock(7260)] == ["3.2 s", "1 min 15 s", "2 h 01 min"]


def test_version_that_stands_for_its_predecessor_is_marked(tmp_path: Path) -> None:
    root = make(tmp_path / "demo")
    path = root / "evaluate" / "evaluation.json"
    evaluation = json.loads(path.read_text())
    evaluation["checkpoints"]["V3"] = "/runs/demo/select"
    path.write_text(json.dumps(evaluation))
    recipe = read_recipe(root)
    assert recipe.notes == {"V3": "= V2"}
    assert recipe.kept == ["SFT", "V1", "V2", "V3"]
