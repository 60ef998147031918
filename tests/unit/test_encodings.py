"""Text is read and written as UTF-8, whatever the machine's locale says."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import llama2

ROOT = Path(llama2.__file__).parents[1]
TEXT = {
    "read_text": 0,
    "write_text": 1,
    "open": 3,
    "fdopen": 3,
    "NamedTemporaryFile": 2,
    "TemporaryFile": 2,
    "TextIOWrapper": 1,
}
"""what opens text, and the number of arguments in front of its encoding"""
RUNS = {"run", "Popen", "check_output"}


def opened_by_locale(tree: ast.AST) -> Iterator[int]:
    """Lines whose calls take the locale's encoding."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue

        name = (
            node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        )
        owner = node.func.value if isinstance(node.func, ast.Attribute) else None
        given = {keyword.arg: keyword.value for keyword in node.keywords}

        if "encoding" in given or None in given:
            continue

        if name in RUNS:
            text = given.get("text", given.get("universal_newlines"))
            if (
                text is not None
                and "errors" not in given
                and not (isinstance(text, ast.Constant) and not text.value)
            ):
                yield node.lineno
        elif name in TEXT and len(node.args) <= TEXT[name]:
            if (
                name == "open"
                and owner is not None
                and ast.unparse(owner) not in ("path", "file", "io")
            ):
                continue  # some other open

            modes = [
                value
                for value in (*node.args, *given.values())
                if isinstance(value, ast.Constant) and isinstance(value.value, str)
            ]
            if name.endswith("TemporaryFile") and not modes:
                continue  # bytes

            if not any("b" in value.value and len(value.value) < 5 for value in modes):
                yield node.lineno


@pytest.mark.parametrize(
    ("code", "faults"),
    [
        ("open(x)", 1),
        ("open(x, 'rb')", 0),
        ("open(x, 'w', encoding='utf-8')", 0),
        ("p.read_text()", 1),
        ("p.read_text('utf-8')", 0),
        ("p.write_text(t)", 1),
        ("path.open()", 1),
        ("path.open('wb')", 0),
        ("subprocess.run(c, text=True)", 1),
        ("subprocess.run(c)", 0),
        ("os.fdopen(d, 'w')", 1),
        ("keys.open(k)", 0),
    ],
)
def test_the_search(code: str, faults: int) -> None:
    assert len(list(opened_by_locale(ast.parse(code)))) == faults


@pytest.mark.parametrize("folder", ["llama2", "benchmarks"])
def test_no_file_is_opened_in_the_encoding_of_the_locale(folder: str) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    assert [
        f"{file.relative_to(ROOT)}:{line}"
        for file in files
        for line in opened_by_locale(ast.parse(file.read_text(encoding="utf-8")))
    ] == []


def test_a_locale_without_letters(policy: Path) -> None:
    """Python's own remedies turned off: letters go in and come out, and nothing ends in a
    traceback."""
    environment = {
        **os.environ,
        "LC_ALL": "C",
        "PYTHONCOERCECLOCALE": "0",
        "PYTHONUTF8": "0",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "llama2.cli",
            "chat",
            str(policy),
            "--temperature",
            "0",
            "--max-tokens",
            "4",
        ],
        input="Gr\u00fc\u00dfe \u4f60\n".encode(),
        capture_output=True,
        env=environment,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.decode().endswith("\n")


def test_what_the_output_cannot_hold_is_spelt_out() -> None:
    for encoding in ("ascii", "latin-1", "utf-8"):
        environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-m", "llama2.cli", "no\u4f60verb"],
            capture_output=True,
            env=environment,
            timeout=120,
        )
        assert done.returncode == 2
        assert b"Traceback" not in done.stderr
