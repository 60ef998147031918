"""What the documents tell people to type is accepted, and what they point to exists."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from llama2 import model_packages
from llama2.recipe import launch
from llama2.recipe.verbs import VERBS

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])

_COMMAND = re.compile(r"(?:^|/|exec )llama2 +([a-z][^'|;&]*)|-m llama2\.cli +(.*)")


def commands(page: Path) -> list[str]:
    """Lines of shell blocks that call llama2, continued lines joined, wrappers such as torchrun
    taken off."""
    blocks = re.findall(r"```sh\n(.*?)```", page.read_text(), re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    found = [_COMMAND.search(line.strip()) for line in lines]

    return [match[1] or match[2] for match in found if match]


CASES = [(page.name, line) for page in PAGES for line in commands(page)]


def test_there_are_commands():
    assert len(CASES) > 25


def stand_in(path: Path) -> Path:
    """A file for a model that a package ships, which need not be installed."""
    return Path("model.gguf") if model_packages.is_package(path) else path


@pytest.mark.parametrize(("page", "line"), CASES)
def test_a_command_is_accepted(page, line, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(model_packages, "locate", stand_in)
    verb, *arguments = shlex.split(line, comments=True)
    assert verb in VERBS
    assert (
        launch.run_command(
            verb, arguments if "--dry-run" in arguments else [*arguments, "--dry-run"]
        )
        == 0
    )
    assert capsys.readouterr().out.startswith("config:")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_files_of_the_paper_exist():
    table = (ROOT / "docs" / "paper.md").read_text().split("## Values")[0]
    for cell in re.findall(r"^\|.*\|(.*)\|$", table, re.MULTILINE):
        for name in re.findall(r"`([\w/{},.]+\.(?:py|yaml))", cell):
            prefix, _, rest = name.partition("{")
            inner, _, suffix = rest.partition("}")
            for each in inner.split(",") if rest else [""]:
                path = f"{prefix}{each}{suffix}"
                assert (ROOT / "llama2" / path).exists() or (ROOT / path).exists(), path
