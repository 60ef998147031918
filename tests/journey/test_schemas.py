"""Recipes and runs of every schema open for ever: they are found finished, whole, and are of use."""

from __future__ import annotations

import io
import json
import re
import sys
import tarfile
from collections import Counter
from pathlib import Path

import pytest
from commands import llama2

from llama2 import schema_version
from llama2.errors import UserError
from llama2.schema_version import SCHEMA, migrate

ARCHIVES = sorted((Path(__file__).parents[1] / "fixtures" / "runs").glob("schema-*.tar.xz"))
CELL = re.compile(r"<td[^>]*>([^<]*\d[^<]*)</td>")  # of a table, with a figure in it


@pytest.fixture(params=ARCHIVES, ids=lambda path: path.name.split(".")[0])
def old(request, tmp_path, monkeypatch) -> Path:
    """A recipe and its finished runs, written by the first code of a schema; the run's folder."""
    with tarfile.open(request.param) as archive:
        archive.extractall(tmp_path, filter="data")

    monkeypatch.chdir(tmp_path)
    return Path("runs/first")


def test_every_schema_has_a_run():
    names = [path.name.split(".")[0] for path in ARCHIVES]
    assert names == [f"schema-{number}" for number in range(1, SCHEMA + 1)]


def test_an_old_recipe_is_found_finished(old, capsys):
    before = {path: path.read_bytes() for path in old.rglob("*") if path.is_file()}
    assert llama2("run", "recipe.yaml", "--out", old) == 0

    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"{old}: all 17 steps done")
    assert all(path.read_bytes() == content for path, content in before.items())
    assert llama2("verify", old) == 0


def test_an_old_run_is_reported_as_it_was(old, tmp_path):
    """Every figure that a stage of then wrote is on the page of now."""
    assert llama2("report", "--recipe", old, "--out", tmp_path / "page") == 0
    page = (tmp_path / "page" / "report.html").read_text()

    cells = Counter(CELL.findall((old / "report" / "report.html").read_text()))
    assert len(cells) > 100
    assert not cells - Counter(CELL.findall(page))


def test_an_old_model_is_talked_to_trained_and_released(old, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"hello\n")))
    assert llama2("chat", old / "v2", "--max-tokens", 4) == 0

    dialogs = old / "world" / "demonstrations.jsonl"
    words = ("--dialogs.a.path", dialogs, "--sequence-length", 192, "--batch-size", 4)
    steps = ("--training.plan.max-steps", 2)
    assert llama2("sft", "--model", old / "sft", *words, *steps, "--out", tmp_path / "sft") == 0

    assert llama2("release", old / "v2", "--out", tmp_path / "release") == 0
    assert (tmp_path / "release" / "README.md").is_file()
    capsys.readouterr()


def test_an_old_run_goes_on(old, capsys):
    """A run without its mark of completion is one that was killed."""
    (old / "sft" / "COMPLETE").unlink()
    assert llama2("run", "recipe.yaml", "--out", old, "--step", "sft") == 0
    assert "resuming" in capsys.readouterr().err
    assert (old / "sft" / "COMPLETE").is_file()


def test_a_later_schema_is_refused(tmp_path, one_line):
    file = tmp_path / "later.yaml"
    file.write_text(f"schema: {SCHEMA + 1}\nout: {tmp_path / 'x'}\nsteps: {{}}\n")
    heard = one_line("run", file)
    assert "was written for schema" in heard
    assert heard.endswith("update llama2")


def test_a_run_says_its_schema_and_a_later_one_is_refused(tmp_path, one_line):
    words = ("world", "--scale", 0.001, "--out", tmp_path / "world")
    assert llama2(*words) == 0

    file = tmp_path / "world" / "manifest.json"
    manifest = json.loads(file.read_text())
    assert manifest.pop("schema") == SCHEMA

    manifest.pop("sum")
    file.write_text(json.dumps({**manifest, "schema": SCHEMA + 1}))
    assert one_line(*words).endswith("update llama2")


@pytest.mark.parametrize("number", ["1", True, 0, 1.5])
def test_a_number_that_is_none_is_refused(number, tmp_path):
    with pytest.raises(UserError, match="it is a number from 1"):
        migrate({"schema": number}, tmp_path)


def test_migrations_follow_one_another(monkeypatch, tmp_path):
    monkeypatch.setattr(schema_version, "SCHEMA", 3)
    steps = {
        1: lambda values: {**values, "b": values["a"] + 1},
        2: lambda values: {**values, "c": values["b"] + 1},
    }
    monkeypatch.setattr(schema_version, "MIGRATIONS", steps)
    assert migrate({"a": 1}, tmp_path) == {"a": 1, "b": 2, "c": 3}
    assert migrate({"schema": 2, "b": 5}, tmp_path) == {"b": 5, "c": 6}
    assert migrate({"schema": 3, "c": 0}, tmp_path) == {"c": 0}
