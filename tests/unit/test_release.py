"""A release: complete, checked, the same bytes from the same run, and silent about where it was
made."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from commands import llama2, vouch

from llama2.errors import UserError
from llama2.formats import checkpoint
from llama2.recipe import launch
from llama2.release import hub
from llama2.release.lineage import trace
from llama2.release.provenance import hide_places

PAPERS = {
    "README.md",
    "RESPONSIBLE_USE.md",
    "CARBON.md",
    "carbon.json",
    "LICENSES.md",
    "COMMANDS.md",
    "reproduce.sh",
    "lineage.json",
    "recipe.yaml",
    "SHA256SUMS",
}
STAGES = [
    "world",
    "clean",
    "tokenizer",
    "tokenize",
    "pretrain",
    "sft",
    "collect",
    "safe",
    "v1_candidate",
    "v1",
]


def files_of(release: Path) -> dict[str, bytes]:
    return {
        path.relative_to(release).as_posix(): path.read_bytes()
        for path in release.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def release(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("releases") / "first"
    assert (
        llama2(
            "release",
            made / "v1",
            "--out",
            out,
            "--gguf",
            "f16,q8_0",
            "--card.license",
            "cc-by-4.0",
        )
        == 0
    )
    return out


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Path:
    """The recipe's directory, to be damaged."""
    return Path(shutil.copytree(made, tmp_path / "elsewhere" / "renamed"))


# --- what it holds ---
def test_everything_is_there(release: Path, made: Path) -> None:
    found = files_of(release)
    assert found.keys() >= PAPERS
    assert {name for name in found if name.startswith("configs/")} == {
        f"configs/{name}.yaml" for name in [*STAGES, "evaluate"]
    }
    assert {name for name in found if name.startswith("gguf/")} == {
        "gguf/tiny-v1-f16.gguf",
        "gguf/tiny-v1-q8_0.gguf",
    }

    for name in ("model.safetensors", "config.json", "tokenizer.model", "tokenizer_config.json"):
        assert found[name] == (made / "v1" / name).read_bytes()


def test_the_checksums_are_those_of_all_files(release: Path) -> None:
    lines = (release / "SHA256SUMS").read_text().splitlines()
    told = {line[66:]: line[:64] for line in lines}
    assert told == {
        name: hashlib.sha256(data).hexdigest()
        for name, data in files_of(release).items()
        if name != "SHA256SUMS"
    }
    assert [line[66:] for line in lines] == sorted(told)


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="there is no sha256sum")
def test_sha256sum_is_content(release: Path) -> None:
    assert (
        subprocess.run(
            ["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=release
        ).returncode
        == 0
    )


def test_another_type_of_weights(made: Path, tmp_path: Path) -> None:
    assert llama2("release", made / "v1", "--out", tmp_path / "out", "--dtype", "bf16") == 0
    ours, theirs = (checkpoint.load(path).state_dict() for path in (tmp_path / "out", made / "v1"))
    assert all(torch.equal(ours[name], theirs[name].bfloat16().float()) for name in theirs)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert "bf16, converted from the run's" in (tmp_path / "out" / "README.md").read_text()


def test_a_reward_model_can_be_released(made: Path, tmp_path: Path) -> None:
    assert llama2("release", made / "safe", "--out", tmp_path / "out") == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card
    assert "A reward model of the Llama 2 architecture" in card
    assert "AutoModelForSequenceClassification" in card
    assert checkpoint.is_scorer(tmp_path / "out")


# --- the same bytes ---
def test_the_same_bytes_elsewhere_and_later(
    release: Path, copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(copied)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert (
        llama2(
            "release",
            "v1",
            "--out",
            tmp_path / "second",
            "--gguf",
            "f16",
            "q8_0",
            "--card.license",
            "cc-by-4.0",
        )
        == 0
    )
    assert files_of(tmp_path / "second") == files_of(release)


def test_released_again_into_the_same_place(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert llama2("release", made / "v1", "--out", out) == 0
    before = files_of(out)
    assert llama2("release", made / "v1", "--out", out) == 0
    assert files_of(out) == before
    assert llama2("release", made / "v1", "--out", out, "--card.title", "Another") == 0
    assert "# Another" in (out / "README.md").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# --- how it was made ---
def test_the_lineage_is_told_in_order(release: Path, made: Path) -> None:
    found = json.loads((release / "lineage.json").read_text())
    assert [stage["name"] for stage in found["stages"]] == STAGES
    weights = hashlib.sha256((made / "v1" / "model.safetensors").read_bytes()).hexdigest()
    assert found["model"]["weights"] == found["stages"][-1]["weights"] == weights
    sft = next(stage for stage in found["stages"] if stage["name"] == "sft")
    assert sft["inputs"]["model"]["place"] == "runs/pretrain"
    assert sft["inputs"]["dialogs.volunteers.path"]["place"] == "inputs/volunteers.jsonl"


def test_every_configuration_is_accepted_by_its_verb(
    release: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(release)
    verbs = {
        stage["name"]: stage["verb"]
        for stage in json.loads((release / "lineage.json").read_text())["stages"]
    }
    for name, verb in [*verbs.items(), ("evaluate", "evaluate")]:
        assert (
            launch.run_command(verb, [f"configs/{name}.yaml", "--out", f"runs/{name}", "--dry-run"])
            == 0
        )

    assert "runs/pretrain" in capsys.readouterr().out


def test_versions_stay_in_their_order(copied: Path, tmp_path: Path) -> None:
    """A manifest sorts its keys; the first version is the one all others are compared with."""
    for name in ("config.yaml", "manifest.json"):
        file = copied / "evaluate" / name
        file.write_text(re.sub(r"\bSFT\b", "Zero", file.read_text()))

    file = copied / "evaluate" / "evaluation.json"
    file.write_text(file.read_text().replace('"SFT"', '"Zero"'))
    vouch(file.parent)
    assert llama2("release", copied / "v1", "--out", tmp_path / "out") == 0
    published = yaml.safe_load((tmp_path / "out" / "configs" / "evaluate.yaml").read_text())
    assert list(published["versions"]) == ["Zero", "V1"]


def test_the_commands_make_the_same_model(
    release: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = Path(shutil.copytree(release, tmp_path / "again"))
    (again / "inputs").mkdir()
    shutil.copy(made.parents[1] / "home" / "mallory" / "volunteers.jsonl", again / "inputs")
    monkeypatch.chdir(again)
    lines = (again / "reproduce.sh").read_text().splitlines()
    commands = [
        shlex.split(line)[1:] for line in lines if line.startswith("OMP_NUM_THREADS=1 llama2 ")
    ]
    assert len(commands) == len(STAGES)

    for program, *words in commands[:6]:
        assert program == "llama2"
        assert llama2(*words) == 0

    for stage in json.loads((again / "lineage.json").read_text())["stages"][:6]:
        if stage["weights"] is not None:
            made_again = (again / "runs" / stage["name"] / "model.safetensors").read_bytes()
            assert hashlib.sha256(made_again).hexdigest() == stage["weights"]


def test_the_script_names_what_is_missing(release: Path, tmp_path: Path) -> None:
    again = Path(shutil.copytree(release, tmp_path / "again"))
    done = subprocess.run(["sh", "reproduce.sh"], cwd=again, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "inputs/volunteers.jsonl is missing\n"


def test_a_run_outside_of_a_recipe(policy: Path, tmp_path: Path) -> None:
    assert llama2("release", policy, "--out", tmp_path / "out") == 0
    found = json.loads((tmp_path / "out" / "lineage.json").read_text())
    assert [stage["name"] for stage in found["stages"]] == ["world", "policy"]
    assert found["stages"][-1]["inputs"]["model"]["place"] == "inputs/base"
    assert not (tmp_path / "out" / "recipe.yaml").exists()
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.count("**Not measured.**") == 2
    assert "`inputs/base`" in (tmp_path / "out" / "LICENSES.md").read_text()


def test_runs_that_began_in_the_same_second_stand_in_the_order_they_were_made(
    policy: Path, world: Path, tmp_path: Path
) -> None:
    for run in (policy, world):
        manifest = Path(shutil.copytree(run, tmp_path / run.name)) / "manifest.json"
        manifest.write_text(
            json.dumps(json.loads(manifest.read_text()) | {"started": "2026-01-01T00:00:00Z"})
        )
        vouch(manifest.parent)

    assert [stage.name for stage in trace(tmp_path / "policy").stages] == ["world", "policy"]


def test_what_was_made_anew_is_not_taken_for_what_was_read(
    copied: Path, made: Path, tmp_path: Path
) -> None:
    manifest = copied / "safe" / "manifest.json"
    manifest.write_text(manifest.read_text().replace(str(made.parent), "/gone"))
    preferences = copied / "collect" / "preferences.jsonl"
    preferences.write_text(preferences.read_text() * 2)
    vouch(manifest.parent, preferences.parent)
    assert llama2("release", copied / "v1", "--out", tmp_path / "out") == 0
    stages = json.loads((tmp_path / "out" / "lineage.json").read_text())["stages"]
    safe = next(stage for stage in stages if stage["name"] == "safe")
    assert safe["inputs"]["preferences.safety.path"]["place"] == "inputs/preferences.jsonl"


# --- what is refused ---
def test_a_run_that_is_not_finished(copied: Path, tmp_path: Path, one_line: Any) -> None:
    (copied / "v1" / "COMPLETE").unlink()
    assert "not finished" in one_line("release", copied / "v1", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["tokenizer", "evaluate", "collect"])
def test_a_run_without_a_model(made: Path, tmp_path: Path, one_line: Any, name: str) -> None:
    assert "holds no model" in one_line("release", made / name, "--out", tmp_path / "out")


def test_what_is_no_run(tmp_path: Path, one_line: Any) -> None:
    assert "no run directory" in one_line("release", tmp_path, "--out", tmp_path / "out")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.model"])
def test_a_damaged_checkpoint(copied: Path, tmp_path: Path, one_line: Any, name: str) -> None:
    file = copied / "v1" / name
    data = file.read_bytes()
    file.unlink()  # it may be a hard link
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    refusal = one_line("release", copied / "v1", "--out", tmp_path / "out")
    assert f"{name}: its content is not what this run wrote" in refusal
    assert list(tmp_path.iterdir()) == [copied.parent]


def test_a_checkpoint_that_lacks_a_file(copied: Path, tmp_path: Path, one_line: Any) -> None:
    (copied / "v1" / "tokenizer.model").unlink()
    assert "tokenizer.model: missing" in one_line(
        "release", copied / "v1", "--out", tmp_path / "out"
    )


def test_a_directory_that_is_not_empty(made: Path, tmp_path: Path, one_line: Any) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    assert "not empty" in one_line("release", made / "v1", "--out", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_the_release_of_another_run(release: Path, made: Path, one_line: Any) -> None:
    before = files_of(release)
    assert "another run" in one_line("release", made / "sft", "--out", release)
    assert files_of(release) == before


def test_a_release_with_something_of_ones_own(made: Path, tmp_path: Path, one_line: Any) -> None:
    out = tmp_path / "out"
    assert llama2("release", made / "v1", "--out", out) == 0
    (out / "mine.txt").write_text("precious")
    assert "mine.txt" in one_line("release", made / "v1", "--out", out, "--card.title", "Another")
    assert (out / "mine.txt").read_text() == "precious"


def test_a_release_inside_its_run(made: Path, one_line: Any) -> None:
    assert "cannot lie in" in one_line("release", made / "v1", "--out", made / "v1" / "release")


def test_a_failure_leaves_nothing_behind(made: Path, tmp_path: Path, one_line: Any) -> None:
    said = one_line(
        "release", made / "v1", "--out", tmp_path / "out", "--licenses.voluntears", "MIT"
    )
    assert "did you mean 'volunteers'" in said
    assert list(tmp_path.iterdir()) == []


# --- privacy ---
def test_no_file_tells_where_it_was_made(release: Path, made: Path) -> None:
    for name, data in files_of(release).items():
        for secret in (
            str(made),
            str(made.parents[1]),
            str(Path.home()) + "/",
            "mallory",
            socket.gethostname() + "/",
        ):
            assert secret.encode() not in data, name

        if name.endswith((".md", ".json", ".yaml", ".sh")) and name != "tokenizer_config.json":
            assert not re.search(
                r"(?<![\w.~<}/-])/(?!INST|SYS|s>|bin/sh|v1/|NAME)[\w.-]+/", data.decode()
            ), name


def test_words_that_name_the_home_directory_are_refused(
    made: Path, tmp_path: Path, one_line: Any
) -> None:
    (tmp_path / "notes.md").write_text(f"I trained it in {made}.")
    said = one_line(
        "release", made / "v1", "--out", tmp_path / "out", "--card.notes", tmp_path / "notes.md"
    )
    assert said.startswith("README.md would name the directory ")


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("/home/al ice/x y.jsonl", "inputs/x y.jsonl"),
        ("~/data/x", "inputs/x"),
        (r"C:\Users\me\x.txt", "inputs/x.txt"),
        ("see /home/me/x.txt, and a/b", "see inputs/x.txt, and a/b"),
        ("http://box-12.corp:8000/v1", "http://server/v1"),
        ("file:///home/x/y", "inputs/y"),
        ("either/or / neither", "either/or / neither"),
        ("runs/sft", "runs/sft"),
    ],
)
def test_places_are_hidden(text: str, hidden: str) -> None:
    assert hide_places(text) == hidden


# --- the Hub ---
class Recorder:
    """Takes what an upload would send."""

    def __init__(self, error: Exception | None = None) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.error = error

    def whoami(self) -> dict[str, Any]:
        return {"name": "me"}

    def create_repo(self, repo_id: str, **settings: Any) -> None:
        self.calls.append((repo_id, settings))

    def upload_folder(self, **settings: Any) -> None:
        if self.error is not None:
            raise self.error

        self.calls.append(
            (settings["repo_id"], settings | {"files": files_of(Path(settings["folder_path"]))})
        )


def test_an_upload_is_private_and_of_the_whole_release(
    release: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    client = Recorder()
    asked: list[str] = []
    hub.push(
        release,
        "me/tiny",
        client,
        private=True,
        sure=False,
        ask=lambda text: asked.append(text) or "y",
    )
    (name, made), (_, sent) = client.calls
    assert (name, made["private"]) == ("me/tiny", True)
    assert sent["files"] == files_of(release)
    assert len(asked) == 1
    heard = capsys.readouterr().err
    assert "private if it is new" in heard
    assert all(f"  {name}  " in heard for name in files_of(release))


def test_nothing_is_uploaded_without_a_yes(release: Path) -> None:
    client = Recorder()
    with pytest.raises(UserError, match="nothing was uploaded"):
        hub.push(release, "me/tiny", client, private=True, sure=False, ask=lambda _: "")

    assert client.calls == []


def test_what_the_hub_refuses_is_one_line(release: Path) -> None:
    errors = pytest.importorskip("huggingface_hub.errors")
    for error in (ConnectionError("unreachable"), errors.HFValidationError("bad name")):
        with pytest.raises(UserError, match="the Hugging Face Hub refused"):
            hub.push(release, "me/tiny", Recorder(error), private=True, sure=True)

    with pytest.raises(ZeroDivisionError):  # our own defects keep their traceback
        hub.push(release, "me/tiny", Recorder(ZeroDivisionError()), private=True, sure=True)


def test_the_command_pushes_what_it_wrote(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = Recorder()
    monkeypatch.setattr(hub, "connect", lambda repository, sure: client)
    assert (
        llama2("release", made / "v1", "--out", tmp_path / "out", "--push", "me/tiny", "--yes") == 0
    )
    assert client.calls[1][1]["files"] == files_of(tmp_path / "out")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--push", "tiny", "--yes"), "no name of a repository"),
        (("--push", "me/tiny"), "nobody is here to confirm"),
        (("--push", "me/tiny", "--yes"), "there is no token"),
    ],
)
def test_an_upload_that_cannot_be_is_refused_before_any_work(
    made: Path,
    tmp_path: Path,
    one_line: Any,
    words: tuple[str, ...],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    library = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(library, "get_token", lambda: None)
    assert said in one_line("release", made / "v1", "--out", tmp_path / "out", *words)
    assert not (tmp_path / "out").exists()


def test_without_push_there_is_no_network(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # an import would fail
    monkeypatch.setattr(socket, "socket", refused)
    assert llama2("release", made / "v1", "--out", tmp_path / "out") == 0
