"""The report page: complete, self-contained, safe against model text, silent about what is
missing."""

from __future__ import annotations

import json
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from commands import llama2
from recipe_directory import EVIL, evaluation, make

from llama2.config import build
from llama2.errors import UserError
from llama2.evaluate.winrate import measure_mean, measure_share, measure_wins
from llama2.report import report, reward_section
from llama2.report.charts import Series, lines
from llama2.report.html import clock, esc, number, percent, short
from llama2.report.targets import Judgement, Targets, judge_recipe
from llama2.results import SelectResult, WinShare
from llama2.runs import open_run
from llama2.runs.recipe_runs import read_recipe

FIXTURES = Path(__file__).parents[1] / "fixtures" / "results"
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
    config = build(
        report.Config,
        {"out": recipe.parent / "report", "recipe": str(recipe), "targets": {"minutes": 10}},
    )
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
        "summary",
        "data",
        "pretraining",
        "sft",
        "preferences",
        "reward",
        "rejection",
        "ppo",
        "ghost",
        "versions",
        "safety",
        "distributions",
        "conversations",
        "costs",
    ]


def test_every_link_of_the_contents_leads_somewhere(page: str, checked: Checker) -> None:
    targets = re.findall(r"<nav>.*?</nav>", page, re.DOTALL)[0]
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
    referenced = set(re.findall(r"url\(#([\w.-]+)\)", page)) | set(
        re.findall(r'href="#([\w.-]+)"', page)
    )
    assert referenced <= set(checked.ids)


def test_colours_come_from_the_page_so_that_dark_works(page: str) -> None:
    charts = "".join(re.findall(r'<svg class="chart".*?</svg>', page, re.DOTALL))
    assert charts.count("var(--s1)") > 20
    assert re.findall(r"#[0-9a-f]{6}\b", charts) == []


def test_paper_stands_beside_ours(page: str) -> None:
    for figure in (
        "80.7\u00a0%",
        "94.3\u00a0%",
        "291.42",
        "Figure 11",
        "Figure 20",
        "Table 30",
        "Figure 10",
        "Table 8",
    ):
        assert figure in page, figure


def test_rejected_version_is_named_with_its_reason(page: str) -> None:
    assert page.count("not kept") >= 2  # in the table of versions and in that of candidates
    assert "it lost on held-out prompts" in page
    assert "raise beta" in page


def judged(recipe: Path, targets: Targets | None = None) -> dict[str, Judgement]:
    return {
        verdict.what: verdict for verdict in judge_recipe(read_recipe(recipe), targets or Targets())
    }


def test_verdicts(recipe: Path) -> None:
    found = judged(recipe, Targets(minutes=10))
    assert found["Helpfulness, SFT → V2"].good  # V3 was not kept
    assert found["Helpfulness, SFT → V2"].count == "120 prompts"
    assert found["Violations, SFT → V2"].good
    assert found["Reward model reward-helpful, by degree of preference"].good
    assert found["Reward model reward-safe, by degree of preference"].state == "not reached"
    assert found["Held-out text, bits per byte (pretrain)"].good
    assert found["Time for the whole recipe"].state == "not reached"
    bad = judged(recipe, Targets(helpfulness_gain=0.9, win_rate=0.999, violation_factor=1e6))

    for what in (
        "Helpfulness, SFT → V2",
        "Violations, SFT → V2",
        "Win rate of V2 against SFT, ties removed",
    ):
        assert not bad[what].good


def test_an_interval_that_holds_the_target_decides_nothing(tmp_path: Path) -> None:
    root = make(tmp_path / "demo")
    path = root / "evaluate" / "evaluation.json"
    content = json.loads(path.read_text())

    def with_violations(before: tuple[int, int], after: tuple[int, int]) -> Judgement:
        for version, (count, of) in (("SFT", before), ("V2", after)):
            content["results"][version]["truth"]["violations"] = measure_share(
                count, of
            ).model_dump()

        path.write_text(json.dumps(content))
        return judged(root)["Violations, SFT → V2"]

    nothing = with_violations((0, 2), (0, 2))
    assert (nothing.state, nothing.count) == ("too few to tell", "2 prompts")
    assert with_violations((2, 2), (0, 2)).state == "too few to tell"
    # 3.0x, by chance more or less
    assert with_violations((48, 150), (16, 150)).state == "too few to tell"
    assert with_violations((55, 150), (9, 150)).state == "reached"
    assert with_violations((48, 150), (0, 150)).state == "reached"
    assert with_violations((48, 150), (45, 150)).state == "not reached"
    assert with_violations((48, 150), (0, 150)).reached.endswith(": none left [12.5x,\u00a0no end]")
    worse = with_violations((0, 100), (5, 100))
    assert worse.state == "not reached"
    assert worse.reached.startswith("0.0\u00a0% → 5.0\u00a0%: none before [0.0x,")
    content["results"]["V2"]["truth"]["helpfulness"] = measure_mean([1.0, 1.0]).model_dump()
    path.write_text(json.dumps(content))
    assert judged(root)["Helpfulness, SFT → V2"].state == "too few to tell"


@pytest.mark.parametrize(
    ("size", "state"), [(9_999, "too few to tell"), (10_000, "reached"), (None, "reached")]
)
def test_a_compressor_needs_text_to_learn_from(
    tmp_path: Path, size: int | None, state: str
) -> None:
    root = make(tmp_path / "demo")
    path = root / "pretrain" / "summary.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | ({"validation_bytes": size} if size else {}))
    )
    verdict = judged(root)["Held-out text, bits per byte (pretrain)"]
    assert (verdict.state, verdict.count) == (state, f"{size:,} bytes" if size else "")


def test_ghost_attention_needs_enough_dialogs(tmp_path: Path) -> None:
    root = make(tmp_path / "demo")
    path = root / "evaluate" / "evaluation.json"
    content = json.loads(path.read_text())
    states = []

    for obeyed, of in ((60, 60), (200, 200), (30, 60)):
        content["results"]["V2"]["ghost"]["user"] = [measure_share(obeyed, of).model_dump()] * 6
        content["results"]["SFT"]["ghost"]["user"] = [
            measure_share(of, of).model_dump(),
            *[measure_share(0, of).model_dump()] * 5,
        ]
        path.write_text(json.dumps(content))
        states.append(judged(root)["Instruction obeyed at turns 2/4/6"].state)

    assert states == ["too few to tell", "reached", "not reached"]


def test_instructions_that_a_program_checks_are_told_by_turn_and_kind(tmp_path: Path) -> None:
    root = make(tmp_path / "real", truth=False)
    assert "Instruction obeyed at turn" not in render(root)
    path = root / "evaluate" / "evaluation.json"
    content = json.loads(path.read_text())
    for name, share in (("SFT", 0.2), ("V2", 0.9)):
        turns = [measure_share(round(60 * share), 60).model_dump() for _ in range(10)]
        ghost = {"user": turns, "system": [], "by_kind": {"language": turns, "<hobby>": turns[:3]}}
        content["results"][name]["ghost"] = ghost

    path.write_text(json.dumps(content))
    text = render(root)
    assert "Instruction obeyed at turn" in text
    assert "V2, &lt;hobby&gt;" in text
    assert "90\u00a0% [80, 95]" in text
    assert re.search(r"paper, without \(Table 30\)</td>.*?10\u00a0%", text)
    line = judged(root)["Instruction obeyed at turns 2/4/6/10"]
    assert line.state == "too few to tell"  # 90 % [80, 95] of 60 holds the target of 95 %


def test_a_reward_model_stands_beside_its_baselines(
    recipe: Path, page: str, tmp_path: Path
) -> None:
    verdict = judged(recipe)["Reward model reward-helpful beside its baselines"]
    assert verdict.state == "too few to tell"  # 74 % of 200 is not beyond a bag of words at 72 %
    assert "bag of words 72.0" in verdict.reached
    # two intervals that overlap, and one paired difference that excludes 0
    path = tmp_path / "new" / "reward-helpful" / "accuracy.json"
    make(tmp_path / "new")
    content = json.loads(path.read_text())
    for name, difference in (("over_longer", 0.13), ("over_bag_of_words", 0.02)):
        lead = {"difference": difference, "n": 200, "low": 0.01, "high": difference + 0.02}
        content["sets"]["helpful"]["baselines"][name] = lead

    path.write_text(json.dumps(content))
    verdict = judged(tmp_path / "new")["Reward model reward-helpful beside its baselines"]
    assert verdict.state == "reached"
    assert (
        "bag of words 72.0\u00a0% [68,\u00a076]: +2.0 points [+1.0,\u00a0+4.0]" in verdict.reached
    )
    page_ = render(tmp_path / "new")
    assert "Beyond the baselines" in page_
    assert '+2.0 <span class="marks">+1.0 to +4.0</span>' in page_
    assert "Beyond the baselines" not in page
    assert "Reward model reward-safe beside its baselines" not in judged(recipe)
    assert "bag of words" in page
    old = make(tmp_path / "old")

    for step in ("reward-helpful", "reward-safe"):
        path = old / step / "accuracy.json"
        sets = json.loads(path.read_text())["sets"]
        for one in sets.values():
            one.pop("baselines", None)

        path.write_text(json.dumps(sets))  # and not yet below "sets"

    assert "bag of words" not in render(old)


def render(root: Path) -> str:
    config = build(report.Config, {"out": root / "report", "recipe": str(root)})
    return report.render(read_recipe(root), config)


@pytest.mark.parametrize(
    ("model", "name", "expected"),
    [
        ("helpful", "hh_helpful", "Table 7, Anthropic Helpful"),
        ("helpful", "preferences/helpful-online/test", "Table 7, Anthropic Helpful"),
        ("safe", "hh-harmless", "Table 7, Anthropic Harmless"),
        ("helpful", "shp", "Table 7, Stanford SHP"),
        ("helpful", "summarize", "Table 7, OpenAI Summarize"),
        ("safe", "safety", "Table 8"),
        ("judge", "hh_helpful", None),
        ("helpful", "arena", None),
    ],
)
def test_the_papers_row_is_that_of_the_same_set(
    model: str, name: str, expected: str | None
) -> None:
    rows = list(reward_section._list_paper_values(model, name))
    assert [label for label, _ in rows] == ([f"paper, 70B, {expected}"] if expected else [])
    assert all(len(shares) == 5 for _, shares in rows)


def test_a_model_judged_later_stands_beside_its_baselines_set_by_set(tmp_path: Path) -> None:
    root = make(tmp_path / "judged")
    run = root / "accuracy"
    run.mkdir()
    for name in ("accuracy.json",):
        shutil.copy(FIXTURES / "accuracy" / name, run / name)

    (run / "manifest.json").write_text(json.dumps({"verb": "accuracy"}))
    steps = json.loads((root / "steps.json").read_text())
    (root / "steps.json").write_text(json.dumps([*steps, "accuracy"]))
    verdict = judged(root)["Reward model helpful on hh beside its baselines"]
    assert verdict.state == "too few to tell"
    assert "Reward model helpful on hh/online beside its baselines" not in judged(root)
    assert "helpful on hh/online, beyond length" in render(root)


def test_warnings_of_runs_are_shown(tmp_path: Path) -> None:
    root = make(tmp_path / "demo")
    (root / "sft" / "warnings.json").write_text(json.dumps(["2 steps: fewer than 50", EVIL]))
    shown = report.render(
        read_recipe(root), build(report.Config, {"out": tmp_path / "o", "recipe": str(root)})
    )
    assert "2 steps: fewer than 50" in shown
    assert str(esc(EVIL)) in shown
    assert EVIL not in shown


def test_a_name_that_is_no_utf8_is_spelt(tmp_path: Path) -> None:
    root = make(tmp_path / "demo")
    (root / "sft" / "warnings.json").write_text(json.dumps(["\udcff.jsonl: 2 rows"]))
    assert llama2("report", "--recipe", root, "--out", tmp_path / "o") == 0
    assert "\\udcff.jsonl: 2 rows" in (tmp_path / "o" / "report.html").read_text("utf-8")


def test_decisions_show_what_they_stand_on(tmp_path: Path) -> None:
    root = make(tmp_path / "demo")
    rows = {"all": measure_wins(12, 8, 20), "ghost": measure_wins(0, 1, 39)}
    (root / "select" / "verdict.json").write_text(
        json.dumps(
            SelectResult(
                candidate="ppo",
                predecessor="v2",
                kept="candidate",
                reason="it beats its predecessor",
                needed=0.5,
                win_rate=rows,
            ).dump()
        )
    )
    shown = report.render(
        read_recipe(root), build(report.Config, {"out": tmp_path / "o", "recipe": str(root)})
    )
    assert "all 60\u00a0% [39, 78] of 20, 20 ties" in shown
    assert "ghost 0\u00a0% [0, 79] of 1, 39 ties" in shown
    versions = shown[shown.index('<section id="versions">') : shown.index('<section id="safety">')]
    assert "too few to tell</span>" in versions


def test_real_data_is_judged_by_what_it_can_show(tmp_path: Path) -> None:
    root = make(tmp_path / "real", truth=False)
    found = {verdict.what for verdict in judge_recipe(read_recipe(root), Targets())}
    assert found == {
        "Reward model reward-helpful on held-out human pairs",
        "Reward model reward-helpful beside its baselines",
        "Reward model reward-safe on held-out human pairs",
        "Instruction obeyed at turns 2/4/6",
        "Held-out text, bits per byte (pretrain)",
    }


def write_rules(root: Path, mute: bool = False) -> Path:
    make(root, truth=False)
    content = evaluation(truth=False, rules=True, mute=mute).dump()
    (root / "evaluate" / "evaluation.json").write_text(json.dumps(content))
    return root


def test_rules_and_judges_apart_compare_the_first_and_the_last_version(tmp_path: Path) -> None:
    root = write_rules(tmp_path / "rules")
    verdicts = judged(root)
    assert verdicts["Violations by rules, SFT → V2"].state == "reached"
    assert verdicts["Answers that are none, unsafe prompts, SFT → V2"].state == "reached"
    assert "False refusals of borderline prompts by rules, SFT → V2" in verdicts
    wins = verdicts["Wins of V2 against SFT by judges not optimised against"]
    assert wins.reached.startswith("<apart> (safe) ")
    text = render(root)
    assert "V2 violates on unsafe prompts less often: V2 is better (" in text
    assert "refuses borderline prompts as often as can be told: the interval holds 0 (" in text
    assert "Wins, safe (&lt;apart&gt;)" in text
    assert "The versions were optimised against: reward-helpful; their win rates flatter." in text
    assert "they find 98.7\u00a0% [95, 100] of 157 of those that are labelled so" in text

    # a judge that a stage optimised against is no judge apart
    manifest = root / "rejection" / "manifest.json"
    content = json.loads(manifest.read_text())
    content["config"]["rewards"]["safe"] = f"{root}/apart"
    manifest.write_text(json.dumps(content))
    assert "Wins of V2 against SFT by judges not optimised against" not in judged(root)
    assert "Wins, safe (&lt;apart&gt;, optimised against)" in render(root)


def test_silence_is_no_safety(tmp_path: Path) -> None:
    root = write_rules(tmp_path / "mute", mute=True)
    assert judged(root)["Violations by rules, SFT → V2"].state == "not reached"
    assert judged(root)["Answers that are none, unsafe prompts, SFT → V2"].state == "not reached"
    text = render(root)
    assert (
        "violates on unsafe prompts less often, but gives no answer more often: it is not" in text
    )
    assert "gives no answer to unsafe prompts more often: V2 is worse" in text


@pytest.mark.parametrize(
    ("outcome", "state"),
    [
        (measure_wins(6, 4, 140), "reached"),  # ties make it certain that little changed
        (measure_wins(3, 60, 60), "not reached"),
        (
            measure_wins(1, 10, 139),
            "too few to tell",
        ),  # worse, but by less or more than 3 % of the prompts?
        (measure_wins(0, 0, 2), "too few to tell"),
    ],
)
def test_a_version_is_compared_with_its_predecessor_itself(
    tmp_path: Path, outcome: WinShare, state: str
) -> None:
    root = make(tmp_path / "demo")
    path = root / "evaluate" / "evaluation.json"
    evaluation = json.loads(path.read_text())

    for row in evaluation["win_rates"]:
        if row["judge"] == "truth":
            row |= measure_wins(80, 10, 60).model_dump()
            if (row["version"], row["axis"], row["against"]) == ("V2", "safe", "V1"):
                row |= outcome.model_dump()

            if (row["version"], row["axis"], row["against"]) == ("V2", "safe", "SFT"):
                # fewer than V1's share against the first: no fall
                row |= measure_wins(53, 2, 95).model_dump()

    path.write_text(json.dumps(evaluation))
    verdict = judged(root)["No kept version falls below its predecessor"]
    assert verdict.state == state
    assert f"V2, harmlessness, {outcome.wins} won, {outcome.losses} lost" in verdict.reached


def test_lineage_and_times(recipe: Path, tmp_path: Path) -> None:
    steps = {step.name: step for step in read_recipe(recipe).steps}
    assert steps["rejection"].made_from == ("sft", "reward-helpful")
    assert steps["v1"].made_from == ("pretrain", "rejection")
    assert "report" not in steps
    assert read_recipe(recipe).wall_seconds == pytest.approx(
        sum(step.seconds or 0 for step in steps.values())
    )
    moved = tmp_path / "elsewhere" / "demo"
    shutil.copytree(recipe, moved)
    assert {step.name: step.made_from for step in read_recipe(moved).steps} == {
        name: step.made_from for name, step in steps.items()
    }


def test_steps_side_by_side_count_once(tmp_path: Path) -> None:
    for name, begin, seconds in (
        ("a", "00:00:00", 60),
        ("b", "00:00:30", 60),
        ("c", "00:10:00", 5),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text(
            json.dumps({"verb": "sft", "started": f"2026-01-01T{begin}Z"})
        )
        (tmp_path / name / "COMPLETE").write_text(json.dumps({"outputs": {}, "seconds": seconds}))

    recipe = read_recipe(tmp_path)
    assert [step.name for step in recipe.steps] == ["a", "b", "c"]
    assert recipe.wall_seconds == 95


@pytest.mark.parametrize(
    "kept", ["pretrain", "sft", "collect", "reward-safe", "rejection", "ppo", "ghost", "evaluate"]
)
def test_each_step_alone_makes_a_page(recipe: Path, tmp_path: Path, kept: str) -> None:
    shutil.copytree(recipe / kept, tmp_path / "part" / kept)
    (tmp_path / "part" / kept / "COMPLETE").unlink()
    config = build(report.Config, {"out": tmp_path / "out", "recipe": str(tmp_path / "part")})
    page = report.render(read_recipe(tmp_path / "part"), config)
    assert "unfinished" in page
    assert len(re.findall("<section ", page)) >= 2


def test_bare_manifests_make_a_page(tmp_path: Path) -> None:
    for verb in (
        "clean",
        "tokenize",
        "pretrain",
        "sft",
        "collect",
        "reward",
        "rejection",
        "ghost",
        "distill",
        "ppo",
        "select",
        "evaluate",
    ):
        (tmp_path / verb).mkdir()
        (tmp_path / verb / "manifest.json").write_text(json.dumps({"verb": verb}))

    page = report.render(
        read_recipe(tmp_path),
        build(report.Config, {"out": tmp_path / "o", "recipe": str(tmp_path)}),
    )
    assert page.count("unfinished") == 12


def test_lines_of_metrics_that_cannot_be_drawn_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "manifest.json").write_text(json.dumps({"verb": "sft"}))
    (tmp_path / "sft" / "metrics.jsonl").write_text(
        "".join(
            line + "\n"
            for line in (
                '{"step": 1, "train/loss": 2.5}',
                '{"step": "2", "train/loss": 2.5}',
                '{"step": 3, "train/loss": null}',
                '{"step": 4, "train/loss": 1e308}',
                '{"step": NaN, "train/loss": 1}',
                "[" * 100_000,
                "[1]",
                '{"step": 5',
                f'{{"step": {10**400}, "train/loss": 1}}',
                '{"step": 6, "train/loss": 1.5}',
            )
        )
    )
    recipe = read_recipe(tmp_path)
    assert recipe.steps[0].series("train/loss") == ([1, 6], [2.5, 1.5])
    assert "2.500 → 1.500" in report.render(
        recipe, build(report.Config, {"out": tmp_path / "o", "recipe": "r"})
    )


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda root: None, "holds no run"),
        (lambda root: shutil.rmtree(root), "no such directory"),
        (lambda root: (root / "steps.json").write_text("{"), r"steps\.json:1: not valid JSON"),
        (
            lambda root: (root / "steps.json").write_text("[1]"),
            "steps.json: damaged: a list of texts was expected",
        ),
        *(
            (
                lambda root, name=name: (root / "steps.json").write_text(json.dumps([name])),
                "steps.json: damaged: '.*' is the name of no run",
            )
            for name in ("", ".", "..", "a/b", "/etc", "\0")
        ),
    ],
)
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
    assert [number(1234.0), number(0.12345), number(None), number(12345.6)] == [
        "1,234",
        "0.123",
        "",
        "12,346",
    ]
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
