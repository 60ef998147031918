"""The table of verbs: it and the imports behind it name the same verbs, and no import is hidden from
the contract of layers."""

import re
from pathlib import Path

import pytest

import llama2
from llama2.recipe import launch, verbs

PACKAGE = Path(llama2.__file__).parent


def test_the_table_and_the_imports_name_the_same_verbs():
    for name in verbs.VERBS.keys() - {"run"}:
        verbs.load(name)

    source = Path(verbs.__file__).read_text()
    assert re.findall(r'case "(\w+)":', source) == [name for name in verbs.VERBS if name != "run"]


def test_every_verb_is_a_stage():
    for name, verb in verbs.VERBS.items():
        module = launch.load(name)
        assert module.__doc__, name
        assert callable(module.run)
        assert module.Config.__doc__
        assert verb.summary


@pytest.mark.parametrize("name", ["run", "nonsense"])
def test_what_is_not_in_it_is_an_error(name):
    with pytest.raises(KeyError, match=name):
        verbs.load(name)


def test_modules_are_imported_by_statements_alone():
    """A name in a string is no import to the checker of layers."""
    optional = {"chat/keyboard.py": ["readline"]}  # not on every system
    imports: dict[str, list[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        hidden = re.findall(r"(?:import_module|__import__)\(\s*[\"']?([\w.]*)", path.read_text())
        if hidden:
            imports[path.relative_to(PACKAGE).as_posix()] = hidden

    assert imports == optional
