"""The stage that CONTRIBUTING.md walks through is a stage: it runs, plans, and is quoted as it is."""

from __future__ import annotations

import importlib.util
import re
import sys
import textwrap
from pathlib import Path
from types import ModuleType

import pytest
from commands import llama2

from llama2 import records
from llama2.recipe import verbs
from llama2.recipe.verbs import Verb
from llama2.records import Prompt

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "docs" / "examples" / "shorten.py"


@pytest.fixture
def example(monkeypatch) -> ModuleType:
    """The example as a verb of the command line."""
    spec = importlib.util.spec_from_file_location("shorten", SOURCE)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "shorten", module)
    spec.loader.exec_module(module)

    load = verbs.load
    monkeypatch.setitem(verbs.VERBS, "shorten", Verb("", "keep short prompts"))
    monkeypatch.setattr(verbs, "load", lambda verb: module if verb == "shorten" else load(verb))
    return module


def test_the_example_runs(example, tokenizer, shared, prompts, tmp_path, capsys):
    words = ["shorten", "--tokenizer", shared / "tokenizer", "--prompts", prompts]
    assert llama2(*words, "--max-tokens", 30, "--out", tmp_path / "short") == 0

    whole = list(records.read(Prompt, prompts))
    short = list(records.read(Prompt, tmp_path / "short" / "prompts.jsonl"))
    result = example.ShortenResult.model_validate_json(
        (tmp_path / "short" / "summary.json").read_text()
    )
    assert 0 < len(short) < len(whole)
    assert [prompt for prompt in whole if prompt in short] == short
    assert result.prompts == len(short)
    assert 0 < result.longest <= 30
    assert f"read {len(whole)}, kept {len(short)}" in capsys.readouterr().err


def test_the_example_plans(example, tokenizer, shared, prompts, tmp_path, capsys):
    words = ["shorten", "--tokenizer", shared / "tokenizer", "--prompts", prompts]
    assert llama2(*words, "--out", tmp_path / "short", "--dry-run") == 0
    assert "vocab_size" in capsys.readouterr().out


def test_the_guide_quotes_the_example():
    guide = (ROOT / "CONTRIBUTING.md").read_text()
    quoted = [
        textwrap.dedent(block) for block in re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    ]
    source = SOURCE.read_text()
    assert len(quoted) == 3
    assert all(block.strip() in source for block in quoted)
