"""A whole recipe: killed, stopped, finished, repeated, changed; then its models are used."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import recipe
import torch
from commands import llama2

from llama2 import records
from llama2.formats import checkpoint
from llama2.records import Dialog, messages_of
from llama2.runs import read_metrics, read_warnings
from llama2.tokenizer.template import encode_dialog, encode_prompt
from llama2.tokenizer.tokenizer import Tokenizer

COMMAND = [sys.executable, "-m", "llama2.cli"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": ""}


@dataclass
class Story:
    """What was seen while the recipe ran, with two interruptions."""

    out: Path
    file: Path
    orphans: list[int] = field(default_factory=list)
    finished_when_killed: list[str] = field(default_factory=list)
    stopped: str = ""
    status: int | None = None
    resumed: str = ""


def descendants(root: int) -> set[int]:
    """Every living process below `root`."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(entry.name))
        except (OSError, ValueError, IndexError):
            continue

    found, waiting = set(), [root]
    while waiting:
        for child in children.get(waiting.pop(), []):
            found.add(child)
            waiting.append(child)

    return found


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def wait_until(condition: Callable[[], object], seconds: float = 200.0) -> bool:
    end = time.time() + seconds
    while not condition():
        if time.time() > end:
            return False

        time.sleep(0.02)

    return True


def finished(out: Path) -> list[str]:
    return sorted(path.parent.name for path in out.glob("*/COMPLETE"))


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    directory = tmp_path_factory.mktemp("journey")
    story = Story(directory / "run", recipe.write(directory / "recipe.yaml"))
    command = [*COMMAND, "run", str(story.file), "--out", str(story.out)]

    first = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=ENVIRONMENT)

    try:
        assert wait_until(lambda: list(story.out.glob("pretrain/checkpoints/step-*")))
        family = descendants(first.pid)
        assert len(family) >= 3  # two ranks and the server they are forked from
    finally:
        first.kill()
        first.wait()

    wait_until(lambda: not any(map(alive, family)), seconds=60)
    story.orphans = [process for process in family if alive(process)]
    story.finished_when_killed = finished(story.out)

    second = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)

    try:
        assert wait_until(
            lambda: list(story.out.glob("sft/checkpoints/step-*")) or second.poll() is not None
        )
        second.terminate()
        story.stopped = second.communicate(timeout=200)[1]
    finally:
        second.kill()
        second.wait()

    story.status = second.returncode

    third = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=250)
    assert third.returncode == 0, third.stderr
    story.resumed = third.stderr

    return story


def test_no_process_outlives_the_parent_that_was_killed(story):
    assert story.orphans == []
    assert story.finished_when_killed == ["clean", "tokenize", "tokenizer", "world"]


def test_sigterm_saves_what_runs_and_exits_with_zero(story):
    assert story.status == 0, story.stopped
    assert re.search(r"stopped after 5 of 17 steps; the same command resumes\n$", story.stopped), (
        story.stopped
    )


def test_a_resumed_recipe_goes_on_where_it_was(story):
    assert "all 17 steps done" in story.resumed
    assert len(finished(story.out)) == 17
    for line in read_warnings(story.out / "helpful"):
        assert f"helpful: warning: {line}\n" in story.resumed

    assert read_warnings(story.out / "helpful")
    log = (story.out / "logs/sft.log").read_text()
    assert f"{story.out / 'sft'}: resuming" in log
    steps = [row["step"] for row in read_metrics(story.out / "sft") if "train/loss" in row]
    assert steps == sorted(set(steps))
    assert not list(story.out.rglob("checkpoints"))


def test_a_finished_recipe_is_skipped(story, capsys):
    before = {path: path.stat().st_mtime_ns for path in story.out.glob("*/*")}
    assert llama2("run", story.file, "--out", story.out) == 0
    assert "all 17 steps done in 0:0" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in story.out.glob("*/*")} == before


def test_a_changed_step_is_refused_before_any_work(story, one_line):
    before = {path: path.read_bytes() for path in story.out.glob("*/*") if path.is_file()}
    refusal = one_line(
        "run",
        story.file,
        "--out",
        story.out,
        "--steps.evaluate.limit",
        5,
        "--steps.more.verb",
        "world",
    )
    assert refusal.startswith(
        f"{story.out / 'evaluate'}: holds a finished run with another configuration: "
        "limit: 12 -> 5; "
    )
    assert {path: path.read_bytes() for path in story.out.glob("*/*") if path.is_file()} == before


def test_every_stage_did_its_work(story):
    pool = list(records.read(Dialog, story.out / "rejection/pool.jsonl"))
    assert len(pool) > 10
    assert all("reward" in one.metadata for one in pool)
    rows = read_metrics(story.out / "v2")
    rollouts = [row for row in rows if "ppo/kl_reference" in row]
    assert [row["step"] for row in rollouts] == [2, 4, 6]
    assert rollouts[0]["ppo/kl_reference"] == 0
    assert rollouts[1]["ppo/kl_reference"] != 0
    assert [row["step"] for row in rows if "heldout/reward" in row] == [0, 2, 4, 6]
    page = (story.out / "report/report.html").read_text()
    assert len(page) > 20_000

    for section in ("pretrain", "Ghost", "V1", "V2"):
        assert section in page


def test_chat_answers_on_a_pipe(story):
    process = subprocess.run(
        [*COMMAND, "chat", str(story.out / "sft"), "--max-tokens", "16"],
        env=ENVIRONMENT,
        input="Hello.\nAnd you?\n",
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("\n") >= 2
    assert process.stderr == ""


def test_transformers_reads_policy_and_reward_model(story):
    transformers = pytest.importorskip("transformers")
    talk = messages_of(
        [
            ("system", "Be brief."),
            ("user", "Name three colors."),
            ("assistant", "Red, green, blue."),
        ]
    )
    tokenizer = Tokenizer.load(story.out / "v1")
    ids = torch.tensor([encode_dialog(tokenizer, talk)[0]])

    with torch.no_grad():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(story.out / "v1")(ids).logits
        torch.testing.assert_close(
            checkpoint.load(story.out / "v1")(ids), theirs, rtol=0, atol=1e-4
        )
        judge = transformers.AutoModelForSequenceClassification.from_pretrained(
            story.out / "helpful"
        )
        ours = checkpoint.load_scorer(story.out / "helpful")(
            ids, lengths_B=torch.tensor([ids.shape[1]])
        )
        torch.testing.assert_close(ours, judge(ids).logits[:, 0], rtol=0, atol=1e-4)

    reader = transformers.AutoTokenizer.from_pretrained(story.out / "v1")
    asked = [{"role": turn.role, "content": turn.content} for turn in talk[:-1]]
    found = reader.apply_chat_template(asked, return_dict=False)
    assert list(found) == encode_prompt(tokenizer, talk[:-1])


def test_a_folder_beside_the_recipe_is_not_taken_for_the_hub(tmp_path, monkeypatch, capsys):
    """`--out run` makes models called run/NAME, which reads like a name of the Hub's."""
    monkeypatch.chdir(tmp_path)
    recipe.write(tmp_path / "recipe.yaml")
    assert llama2("run", "recipe.yaml", "--out", "run", "--dry-run") == 0
    assert "run/pretrain" in capsys.readouterr().out
