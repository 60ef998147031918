"""Results of stages: files of earlier versions open, and nothing reads what no stage writes."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

import llama2
from llama2 import results
from llama2.errors import UserError
from llama2.results import StageResult
from llama2.runs.recipe_runs import read_recipe, read_result

PACKAGE = Path(llama2.__file__).parent
FILES = Path(__file__).parents[1] / "fixtures" / "results"
"""<stage>/<file> as version 0.1.0 wrote them, shortened"""


def kinds(base: type[StageResult] = StageResult) -> list[type[StageResult]]:
    """Every result that a stage writes."""
    found = [base] if hasattr(base, "stage") else []
    for kind in base.__subclasses__():
        found += kinds(kind)

    return found


@pytest.mark.parametrize("kind", kinds(), ids=lambda kind: kind.__name__)
def test_files_of_earlier_versions_open(kind: type[StageResult]) -> None:
    result = read_result(FILES / kind.stage, kind)
    assert result is not None
    again = kind.model_validate(json.loads(json.dumps(result.dump())))
    assert again == result


def test_earlier_spellings_have_their_meaning() -> None:
    def read(kind):
        return read_result(FILES / kind.stage, kind)

    web = read(results.CleanResult).sources["web"]
    assert (web.documents, web.kept, web.heldout, web.bytes) == (951, 671, 23, 113437)
    assert web.changes["duplicate documents removed"] == 226
    assert not {"documents", "kept", "held out"} & web.changes.keys()
    assert read(results.DistillResult).safety_before == pytest.approx(0.919, abs=1e-3)
    assert read(results.PretrainResult).validation.bits_per_byte == pytest.approx(0.239, abs=1e-3)
    assert read(results.SftResult).validation.loss == pytest.approx(0.203, abs=1e-3)
    helpfulness = read(results.AccuracyResult).sets["helpfulness"]
    assert helpfulness.all.rate == pytest.approx(0.796, abs=1e-3)
    assert list(helpfulness.by_degree) == ["significantly", "better", "slightly", "negligibly"]
    assert read(results.WorldResult).records["demonstrations.jsonl"] == 6000
    (example,) = read(results.GhostResult).examples
    assert [turn.role for turn in example.messages[:2]] == ["user", "assistant"]


def test_a_run_without_validation_and_one_of_a_single_set_open() -> None:
    sft = json.loads((FILES / "sft" / "summary.json").read_text())
    assert results.SftResult.model_validate({**sft, "validation": {}}).validation is None
    sets = json.loads((FILES / "reward" / "accuracy.json").read_text())["sets"]
    assert results.AccuracyResult.model_validate(sets).sets.keys() == sets.keys()


def test_what_is_at_its_default_is_left_out_of_the_file() -> None:
    counts = results.ReadCounts(read=2, kept=2, skipped={})
    assert counts.model_dump(exclude_defaults=True) == {"read": 2, "kept": 2, "skipped": {}}
    nothing = results.Proportion(rate=None, n=0, low=0.0, high=1.0)
    assert nothing.model_dump(exclude_defaults=True)["rate"] is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"summary.json:1: not valid JSON"),
        ("[1]", r"summary.json: damaged"),
        ('{"vocab_size": 3}', r"summary.json: damaged: 'fingerprint': Field required"),
        ('{"vocab_size": "x", "fingerprint": "f"}', r"summary.json: damaged: 'vocab_size'"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, content: str, message: str) -> None:
    assert read_result(tmp_path, results.TokenizerResult) is None
    (tmp_path / "summary.json").write_text(content)
    with pytest.raises(UserError, match=message):
        read_result(tmp_path, results.TokenizerResult)


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        (results.EvaluateResult, {"versions": ["SFT", "V9"]}),
        (results.EvaluateResult, {"versions": []}),
        (results.AttentionResult, {"names": ["V9"]}),
        (results.SelectResult, {"win_rate": {}}),
        (results.CurvesResult, {"k": [1]}),
    ],
)
def test_a_file_that_contradicts_itself_is_damaged(
    tmp_path: Path, kind: type[StageResult], change: dict[str, object]
) -> None:
    content = json.loads((FILES / kind.stage / kind.file).read_text())
    (tmp_path / kind.file).write_text(json.dumps({**content, **change}))
    with pytest.raises(UserError, match="damaged"):
        read_result(tmp_path, kind)


def trees(folder: str) -> Iterator[tuple[str, ast.Module]]:
    """The modules of a package, parsed."""
    for file in sorted((PACKAGE / folder).glob("*.py")):
        yield file.stem, ast.parse(file.read_text())


@pytest.mark.parametrize("kind", kinds(), ids=lambda kind: kind.__name__)
def test_a_result_is_written_by_the_stage_that_it_names(kind: type[StageResult]) -> None:
    makers = {
        module
        for module, tree in trees("stages")
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == kind.__name__
    }
    assert makers == {kind.stage}


def test_stages_write_their_results_as_results() -> None:
    written = [
        f"{module}:{node.lineno}"
        for module, tree in trees("stages")
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr == "write_json"
    ]
    assert written == []


def string_keys(folder: str) -> list[str]:
    """Where a package looks something up by a name in quotes: `x["name"]`, `x.get("name")`."""
    places = []
    for module, tree in trees(folder):
        for node in ast.walk(tree):
            keys: list[ast.expr] = []
            if isinstance(node, ast.Subscript):
                keys = [node.slice]
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                keys = node.args[:1] if node.func.attr == "get" else []

            for key in keys:
                if isinstance(key, ast.Constant) and isinstance(key.value, str):
                    places.append(f"{module}:{node.lineno}: {key.value}")

    return places


def test_the_report_reads_results_by_their_fields() -> None:
    assert string_keys("report") == []


OTHER_FILES = {"family", "fingerprint", "helpful", "parameters", "prompts", "safe"}
"""keys of manifests, recipes, metadata and judges that fields of results are called too"""


def field_names(part: type[results.base.ResultPart]) -> set[str]:
    """The names of the fields of all results and their parts."""
    names = set(part.model_fields)
    for kind in part.__subclasses__():
        names |= field_names(kind)

    return names


def test_a_release_reads_results_by_their_fields() -> None:
    keys = {place.rpartition(": ")[2] for place in string_keys("release")}
    assert keys & field_names(results.base.ResultPart) <= OTHER_FILES


def test_a_step_reads_a_result_once(tmp_path: Path) -> None:
    run = tmp_path / "tokenizer"
    run.mkdir()
    (run / "manifest.json").write_text(json.dumps({"verb": "tokenizer"}))
    (run / "summary.json").write_text((FILES / "tokenizer" / "summary.json").read_text())
    recipe = read_recipe(tmp_path)
    ((step, result),) = recipe.results(results.TokenizerResult)
    assert result is step.result(results.TokenizerResult)
    assert recipe.results(results.CleanResult) == []
    assert step.result(results.CurvesResult) is None
