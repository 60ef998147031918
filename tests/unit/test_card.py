"""The papers of a release say what was measured, all of it, and call the rest unmeasured."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import llama2, vouch

from llama2.evaluate.winrate import bound_share
from llama2.release import markdown as md

Rows = list[dict[str, Any]]


@pytest.fixture
def recipe(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "tiny"))


def papers(run: Path, *words: object) -> dict[str, str]:
    """The papers of a release by name."""
    out = run.parents[1] / "released"
    assert llama2("release", run, "--out", out, *words) == 0
    return {path.name: path.read_text() for path in out.glob("*.md")}


def sections(text: str) -> dict[str, str]:
    """The text below each heading."""
    return dict(re.findall(r"^#+ (.*)\n((?:(?!#+ ).*\n?)*)", text, re.MULTILINE))


def rows_of(text: str) -> list[list[str]]:
    """The cells of the tables in a text, without their heads."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[2:]]


def change_rows(recipe: Path, change: Callable[[Rows], None]) -> Rows:
    """Put other judgements into the samples of the evaluation; the rows of V1."""
    file = recipe / "evaluate" / "samples.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    change([row for row in rows if row["version"] == "V1"])
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    vouch(file.parent)

    return [row for row in rows if row["version"] == "V1"]


def change_evaluation(recipe: Path, change: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    file = recipe / "evaluate" / "evaluation.json"
    found: dict[str, Any] = json.loads(file.read_text())
    change(found)
    file.write_text(json.dumps(found))
    vouch(file.parent)

    return found


# --- the front matter ---
def test_the_hub_reads_the_front_matter(recipe: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    truth = {"helpfulness": {"mean": 0.625, "low": 0.5, "high": 0.75, "n": 9}}
    change_evaluation(recipe, lambda found: found["results"]["V1"]["truth"].update(truth))
    text = papers(
        recipe / "v1",
        "--card.license",
        "cc-by-4.0",
        "--card.language",
        "en",
        "de",
        "--card.base-model",
        "me/base",
        "--card.datasets",
        "me/data",
        "--card.title",
        "Tiny: a model",
    )["README.md"]
    card = hub.ModelCard(text)
    assert (card.data.license, card.data.language, card.data.base_model) == (
        "cc-by-4.0",
        ["en", "de"],
        "me/base",
    )
    assert (card.data.library_name, card.data.pipeline_tag, card.data.model_name) == (
        "transformers",
        "text-generation",
        "Tiny: a model",
    )
    found = {
        (one.dataset_config, one.metric_type): one.metric_value for one in card.data.eval_results
    }
    assert found["helpful", "helpfulness"] == 0.625
    assert found["unsafe", "violation_rate"] == 0.0
    assert {kind for kind, _ in found} == {"helpful", "unsafe", "borderline"}


def test_what_nobody_said_is_not_made_up(recipe: Path) -> None:
    text = papers(recipe / "v1")["README.md"]
    matter = yaml.safe_load(text.split("---\n")[1])
    assert matter["license"] == "unknown"
    assert not {"language", "base_model", "datasets"} & matter.keys()
    assert "| Licence of the weights | not stated |" in text
    assert "Nobody is named" in sections(text)["Contact"]


def test_a_persons_words_take_their_places(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("Thanks to *everybody*.\n")
    found = papers(
        recipe / "v1",
        "--card.notes",
        tmp_path / "notes.md",
        "--card.contact",
        "ai@example.org",
        "--card.intended-use",
        "Tests.",
        "--card.out-of-scope",
        "The rest.",
    )
    parts = sections(found["README.md"])
    assert parts["Notes by whoever released it"].strip() == "Thanks to *everybody*."
    assert (parts["Intended use"].strip(), parts["Out of scope"].strip()) == ("Tests.", "The rest.")
    assert "ai@example.org" in found["RESPONSIBLE_USE.md"]


# --- how to use it ---
def test_the_code_in_the_card_runs(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    for run in ("v1", "pretrain", "safe"):
        shutil.rmtree(recipe.parent / "released", ignore_errors=True)
        text = papers(recipe / run)["README.md"]
        monkeypatch.chdir(recipe.parent / "released")
        capsys.readouterr()

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exec(re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0], {})

        # a model this small may have nothing to say
        assert capsys.readouterr().out.strip() or run == "v1"
        monkeypatch.undo()


def test_a_model_that_only_goes_on_with_text_says_so(recipe: Path) -> None:
    text = papers(recipe / "pretrain")["README.md"]
    assert "It was not tuned for conversations" in text
    assert "llama2 chat" not in text
    assert "conversational" not in text


# --- results ---
def test_every_stage_is_in_the_table_with_its_checkpoint(recipe: Path) -> None:
    rows = {
        row[0]: row
        for row in rows_of(sections(papers(recipe / "v1")["README.md"])["How it was made"])
    }
    assert list(rows) == [
        "world",
        "clean",
        "tokenizer",
        "tokenize",
        "pretrain",
        "sft",
        "collect",
        "safe",
        "v1\\_candidate",
        "v1",
    ]
    assert rows["sft"][2] == "world, inputs/volunteers.jsonl, pretrain"
    weights = json.loads((recipe / "sft" / "COMPLETE").read_text())["outputs"]["model.safetensors"]
    assert rows["sft"][3] == f"`{weights[:12]}`"
    assert rows["v1\\_candidate"][4] == "1"


def test_rates_by_category_are_those_of_the_samples(recipe: Path) -> None:
    def judge(rows: Rows) -> None:
        for index, row in enumerate(rows):  # in so small a world there are few unsafe ones
            row.update(
                kind="unsafe" if index % 4 else "borderline",
                safe=index % 3 != 0,
                refusal=index % 2 == 0,
                family=("insults", "weapons")[index % 5 // 2 % 2],
            )

    rows = change_rows(recipe, judge)
    unsafe = [row for row in rows if row["kind"] == "unsafe"]
    expected: dict[str, list[bool]] = {}

    for row in unsafe:
        expected.setdefault(row["family"], []).append(not row["safe"])

    found = papers(recipe / "v1")
    shown = {
        row[1]: row[2:]
        for row in rows_of(sections(found["README.md"])["Violations by category"])
        if row[0] == "family"
    }
    assert shown.keys() == expected.keys()

    for family, marks in expected.items():
        low, high = bound_share(sum(marks), len(marks))
        assert shown[family] == [
            f"{sum(marks)} of {len(marks)}",
            f"{100 * sum(marks) / len(marks):.1f} % [{100 * low:.1f}, {100 * high:.1f}]",
        ]

    failed = sum(not row["safe"] for row in unsafe)
    use = found["RESPONSIBLE_USE.md"]
    assert f"{failed} of {len(unsafe)} unsafe prompts got an unsafe answer" in use
    worst = [row[3] for row in rows_of(sections(use)["Where it gives unsafe answers"])]
    rates = [float(text.split()[0]) for text in worst]
    assert rates == sorted(rates, reverse=True)
    assert min(rates) > 0


def test_no_violation_is_no_proof(recipe: Path) -> None:
    rows = change_rows(recipe, lambda rows: [row.update(safe=True) for row in rows] and None)
    count = sum(row["kind"] == "unsafe" for row in rows)
    assert (
        f"None of {count} answers to unsafe prompts was a violation. That still allows a rate of up to "
        f"{100 * bound_share(0, count)[1]:.1f} %"
    ) in papers(recipe / "v1")["RESPONSIBLE_USE.md"]


def test_what_the_servers_check_would_do(recipe: Path) -> None:
    def judge(rows: Rows) -> None:
        for row in rows:
            row.update(
                kind="unsafe" if row["kind"] == "unsafe" else "helpful",
                safe=row["kind"] != "unsafe",
                reward_safe=0.9,
            )

        for row, score in zip((row for row in rows if row["kind"] == "unsafe"), (0.1, 0.3)):
            row["reward_safe"] = score

    rows = change_rows(recipe, judge)
    bad, good = (sum(row["kind"] == kind for row in rows) for kind in ("unsafe", "helpful"))
    use = sections(papers(recipe / "v1")["RESPONSIBLE_USE.md"])["Before others use it"]
    assert [(row[0], row[1].split(" % ")[0], row[2].split(" % ")[0]) for row in rows_of(use)] == [
        ("0.15", f"{100 / bad:.1f}", "0.0"),
        ("0.5", f"{200 / bad:.1f}", "0.0"),
    ]
    assert good
    assert "trained against this very reward model" in use or 2 / bad >= 0.5


def win(judge: str, wins: int, losses: int) -> dict[str, Any]:
    low, high = bound_share(wins, wins + losses)
    return {
        "version": "V1",
        "against": "SFT",
        "axis": "safe",
        "judge": judge,
        "wins": wins,
        "losses": losses,
        "ties": 3,
        "rate": wins / (wins + losses),
        "low": low,
        "high": high,
    }


def test_a_step_back_and_judges_that_disagree_are_named(recipe: Path) -> None:
    change_evaluation(
        recipe, lambda found: found.update(win_rates=[win("truth", 3, 20), win("reward", 30, 5)])
    )
    told = sections(papers(recipe / "v1")["README.md"])["Win rates of this model"]
    assert "**It falls behind SFT in harmlessness, by ground truth.**" in told
    assert "Against SFT in harmlessness the judges disagree." in told
    assert rows_of(told)[0] == [
        "SFT",
        "harmlessness",
        "ground truth",
        "3",
        "20",
        "3",
        "13.0 % [4.5, 32.1]",
    ]


def test_a_win_is_not_called_a_step_back(recipe: Path) -> None:
    change_evaluation(
        recipe, lambda found: found.update(win_rates=[win("truth", 20, 3), win("reward", 30, 5)])
    )
    told = sections(papers(recipe / "v1")["README.md"])["Win rates of this model"]
    assert "falls behind" not in told
    assert "disagree" not in told


def test_a_judge_that_trained_the_model_is_named(recipe: Path) -> None:
    assert (
        "The reward model that judges harmlessness also trained this model"
        in papers(recipe / "v1")["README.md"]
    )
    shutil.rmtree(recipe.parent / "released")
    assert "also trained this model" not in papers(recipe / "sft")["README.md"]


def read_the_prompts(recipe: Path, key: str) -> None:
    """Let the manifest of `sft` say that it read the prompts of the evaluation."""
    prompts = json.loads((recipe / "evaluate" / "manifest.json").read_text())
    file = recipe / "sft" / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["inputs"][f"{key}.0"] = prompts["inputs"]["prompts"]
    manifest["config"][key] = [prompts["config"]["prompts"]]
    file.write_text(json.dumps(manifest))
    vouch(file.parent)


def test_prompts_that_were_learnt_from_are_named(recipe: Path) -> None:
    assert (
        "No stage that the model was made from read the file of these prompts."
        in papers(recipe / "v1")["README.md"]
    )
    read_the_prompts(recipe, "more")
    assert "**`sft` read these prompts" in papers(recipe / "v1")["README.md"]


def test_prompts_that_were_left_out_were_not_learnt_from(recipe: Path) -> None:
    read_the_prompts(recipe, "exclude")
    assert (
        "read the file of these prompts but to leave them out" in papers(recipe / "v1")["README.md"]
    )


def test_without_ground_truth_nothing_is_called_truth(recipe: Path) -> None:
    def forget(found: dict[str, Any]) -> None:
        for result in found["results"].values():
            del result["truth"]

        found["win_rates"] = [row for row in found["win_rates"] if row["judge"] == "reward"]

    def strip(rows: Rows) -> None:
        for row in rows:
            for key in ("safe", "refusal", "helpfulness"):
                del row[key]

            row["reward_safe"] = 0.4

    change_evaluation(recipe, forget)
    rows = change_rows(recipe, strip)
    found = papers(recipe / "v1")
    assert "No person and no ground truth has judged the answers" in found["README.md"]
    assert (
        "by the safety reward model, which gives them a probability of safety below 0.5"
        in found["README.md"]
    )
    assert f"Of {sum(row['kind'] == 'unsafe' for row in rows)} unsafe prompts" in found["README.md"]
    assert "False refusals: not measured" in found["README.md"]
    assert (
        sections(found["RESPONSIBLE_USE.md"])["Where it refuses what it should answer"].strip()
        == "Not measured."
    )


def test_an_evaluation_of_another_model_is_not_this_models(recipe: Path) -> None:
    file = recipe / "evaluate" / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["inputs"] |= {
        key: "0" * 64 for key in manifest["inputs"] if key.startswith("versions.")
    }
    file.write_text(json.dumps(manifest))
    vouch(file.parent)
    found = papers(recipe / "v1")
    assert found["README.md"].count("**Not measured.**") == 2
    assert "model-index" not in found["README.md"]
    assert "**Nothing.**" in found["RESPONSIBLE_USE.md"]


def test_a_candidate_with_the_weights_of_what_was_measured(recipe: Path) -> None:
    assert "This model is `V1` in the evaluation" in papers(recipe / "v1_candidate")["README.md"]


# --- licences ---
def licences(recipe: Path, *words: object) -> list[list[str]]:
    return rows_of(sections(papers(recipe / "v1", *words)["LICENSES.md"])["Data"])


def test_a_licence_is_what_the_recipe_says_or_the_release(recipe: Path) -> None:
    row = ["volunteers", "sft", "data", "`inputs/volunteers.jsonl`"]
    assert licences(recipe) == [[*row, "CC-BY-4.0", "the recipe"]]
    assert licences(recipe, "--licenses.volunteers", "MIT") == [[*row, "MIT", "this release"]]
    (recipe / "recipe.yaml").write_text(
        (recipe / "recipe.yaml").read_text().replace("license: CC-BY-4.0", "weight: 1")
    )
    assert licences(recipe) == [[*row, "CC-BY-4.0", "the run"]]


def test_an_unknown_licence_is_called_unknown(recipe: Path) -> None:
    for file in ("recipe.yaml", "sft/config.yaml"):
        (recipe / file).write_text(
            (recipe / file).read_text().replace("license: CC-BY-4.0", "license: null")
        )

    for stage in ("sft", "v1_candidate"):
        file = recipe / stage / "manifest.json"
        file.write_text(file.read_text().replace('"CC-BY-4.0"', "null"))
        vouch(file.parent)

    assert licences(recipe)[0][4:] == ["**unknown**", ""]
    assert "**1 of 1 licences are unknown.**" in papers(recipe / "v1")["LICENSES.md"]


@pytest.mark.parametrize(
    ("name", "derived"),
    [
        ("meta-llama/Llama-2-7b-hf", True),
        ("me/llama2-chat", True),
        ("me/llama-3", False),
        ("me/llama2.c-15m", False),
    ],
)
def test_llama_2_has_a_licence_of_its_own(recipe: Path, name: str, derived: bool) -> None:
    found = papers(recipe / "v1", "--card.base-model", name)
    for paper in ("README.md", "LICENSES.md"):
        assert ("Llama 2 Community License and Meta's" in found[paper]) == derived

    assert ("license: llama2\n" in found["README.md"]) == derived


def test_a_finished_run_is_not_refused_for_a_licence(
    recipe: Path, made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for manifest in recipe.glob("*/manifest.json"):
        manifest.write_text(manifest.read_text().replace(str(made), str(recipe)))
        vouch(manifest.parent)

    text = (
        (made.parents[1] / "recipe.yaml")
        .read_text()
        .replace("CC-BY-4.0", "MIT")
        .replace(str(made), str(recipe))
    )
    (recipe.parent / "recipe.yaml").write_text(text)
    assert llama2("run", recipe.parent / "recipe.yaml", "--step", "sft") == 0
    assert "already finished" in capsys.readouterr().err
    assert licences(recipe)[0][4:] == ["MIT", "the recipe"]


# --- Markdown ---
def test_names_are_not_markup() -> None:
    assert md.text("a|b <script> *x*\n# y") == r"a\|b \<script\> \*x\* \# y"
    assert md.code("a`b|c\nd") == r"`a'b\|c d`"
    assert md.table(("A", "B"), [("x", ""), ("y", "2")]).splitlines() == [
        "| A | B |",
        "| :-- | --: |",
        "| x |   |",
        "| y | 2 |",
    ]
