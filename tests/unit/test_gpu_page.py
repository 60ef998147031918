"""`make gpu` before any GPU: it goes the whole way on a CPU, survives what fails or hangs, and
replaces nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
MACHINE = {
    "python": "3.12.3",
    "torch": "2.11.0",
    "cuda": "13.0",
    "device": "NVIDIA H100 80GB HBM3",
    "driver": "580",
}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu

    monkeypatch.setattr(gpu, "SITE", tmp_path / "site")

    return gpu


@pytest.fixture
def page(gpu: Any, tmp_path: Path) -> Any:
    return gpu.Page(tmp_path / "gpu.md", MACHINE, False, "2026-01-01")


def run(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(BENCHMARKS / "gpu.py"), *map(str, words)],
        text=True,
        cwd=ROOT,
        capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_whole_way_on_a_cpu(tmp_path: Path) -> None:
    done = run("--tiny", "--page", tmp_path / "gpu.md")
    text = (tmp_path / "gpu.md").read_text()
    assert done.returncode == 0, done.stdout[-3000:] + text[-3000:]
    assert "no figure below means anything" in text
    assert "0 failed" in text

    for title in ("Ceilings", "Training", "Generation", "Memory against the plan", "PPO", "Tests"):
        assert f"\n## {title}" in text

    assert "one iteration of ppo[bf16] | passed" in text
    assert "What failed" not in text


@pytest.mark.skipif(os.path.exists("/dev/nvidia0"), reason="there is a device")
def test_without_a_device_one_line_and_nothing_else(tmp_path: Path) -> None:
    done = run("--page", tmp_path / "gpu.md")
    assert done.returncode == 0
    assert done.stdout.startswith("no CUDA device")
    assert done.stdout.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_page_before_any_gpu_is_the_writers_own(gpu: Any, tmp_path: Path) -> None:
    """docs/gpu.md is what `--empty` writes, until a run has replaced it."""
    gpu.Page(tmp_path / "gpu.md").write()
    ours = (ROOT / "docs" / "gpu.md").read_text()
    assert "No GPU has run this code yet" in (tmp_path / "gpu.md").read_text()
    assert ours == (tmp_path / "gpu.md").read_text() or "\n## The machine\n" in ours


def test_a_part_that_fails_leaves_its_last_words(
    gpu: Any, page: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = tmp_path / "gpu_jobs.py"
    script.write_text('print(\'{"what": "copy", "bytes_per_second": 3e12}\', flush=True)\n1 / 0\n')
    monkeypatch.setattr(gpu, "HERE", tmp_path)
    gpu.job(page, "ceilings", 60, False)
    assert page.failures == ["ceilings"]
    text = page.path.read_text()
    assert "3.00 TB/s" in text, "what it found before it failed counts"
    assert "ZeroDivisionError: division by zero" in text
    assert "(exit status 1)" in text


def test_a_part_that_hangs_is_ended_with_all_it_has_started(
    gpu: Any, page: Any, tmp_path: Path
) -> None:
    child = tmp_path / "child"
    code = (
        "import subprocess, sys, time; one = subprocess.Popen([sys.executable, '-c', 'input()'], stdin=-1);"
        f"open({str(child)!r}, 'w').write(str(one.pid)); print('begun', flush=True); time.sleep(60)"
    )
    begun = time.monotonic()
    said = gpu.finished([sys.executable, "-c", code], 3.0, hear=lambda line: None)
    assert time.monotonic() - begun < 20
    assert said.startswith("begun")
    assert "its time was up" in said
    time.sleep(0.2)
    state = Path(f"/proc/{child.read_text()}/status")
    assert not state.exists() or "zombie" in state.read_text()


def test_nothing_is_begun_when_the_time_is_up(gpu: Any, page: Any) -> None:
    gpu.job(page, "ppo", 2.0, False)
    gpu.tests(page, ["test_model"], -1.0, False)
    assert page.ends == {
        "ppo": "not begun: the time was up",
        "tests: test_model": "not begun: the time was up",
    }


def test_the_parts_fit_into_their_time(gpu: Any) -> None:
    """Each has a limit, all are known to the jobs, and the device is ours for eight minutes."""
    import gpu_jobs

    assert set(gpu.JOBS) == set(gpu_jobs.JOBS)
    assert set(gpu.TINY_JOBS) <= set(gpu_jobs.JOBS)
    assert {f"{name}.py" for name in gpu.TESTS} == {
        path.name for path in (ROOT / "tests/gpu").glob("test_*.py")
    }
    first = ("ceilings", "training 1b", "generation 1b", "training 7b", "generation 7b")
    assert sum(gpu.TESTS.values()) + sum(gpu.JOBS[name] for name in first) < 60 * 10


@pytest.mark.parametrize("wheels", [True, False])
def test_only_what_is_missing_is_installed(
    gpu: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, wheels: bool
) -> None:
    names = [
        "torch-2.13.0-cp312-cp312-linux_x86_64.whl",
        "nvidia_cublas-13.0-py3-none-any.whl",
        "numpy-2.0-py3-none-any.whl",
        "surely_missing-1.0-py3-none-any.whl",
    ]
    folder = tmp_path / "wheels"
    folder.mkdir()

    for name in names if wheels else ():
        (folder / name).touch()

    commands: list[list[str]] = []
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(gpu, "NEEDED", {"numpy": "numpy", "surely_missing": "surely-missing"})
    monkeypatch.setattr(
        gpu, "finished", lambda command, seconds: commands.append(command) or "no network"
    )
    told = gpu.provide(folder, time.monotonic() + 5)
    (command,) = commands
    asked = [Path(word).name for word in command if word.endswith(".whl")]
    assert asked == (["surely_missing-1.0-py3-none-any.whl"] if wheels else [])
    assert ("surely-missing" in command) != wheels
    assert not any("torch" in word for word in command[4:] if "site" not in word)
    assert "Not there at all: surely-missing" in told[1]
    assert "no network" in told[1]
    assert os.environ["PYTHONPATH"] == str(gpu.SITE)


def test_a_machine_that_has_all_is_left_alone(
    gpu: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(gpu, "NEEDED", {"numpy": "numpy"})
    monkeypatch.setattr(gpu, "finished", lambda *_: pytest.fail("it installs"))
    before = os.environ.get("PYTHONPATH"), [*sys.path]
    assert gpu.provide(tmp_path, time.monotonic() + 5) == []
    assert (os.environ.get("PYTHONPATH"), sys.path) == before


def test_a_page_of_every_kind_of_figure(page: Any) -> None:
    page.figures = [
        {"what": "copy", "bytes_per_second": 4e12},
        {"what": "product", "flops": 8e14},
        {
            "what": "training",
            "shape": "7b",
            "layers": 18,
            "of": 32,
            "parameters": 3_900_000_000,
            "rows": 1,
            "length": 4096,
            "compile": False,
            "checkpointing": True,
            "tokens_per_second": 9000.0,
            "flops": 2e14,
            "first_seconds": 3.0,
            "plan_bytes": 70 * 2**30,
            "peak_bytes": 56 * 2**30,
        },
        {
            "what": "decode",
            "shape": "1b",
            "rows": 16,
            "prompt": 128,
            "new": 128,
            "graphs": True,
            "tokens_per_second": 5000.0,
            "seconds_per_step": 0.0032,
            "bytes_per_second": 1e12,
            "peak_bytes": 2**31,
            "plan_bytes": 2**31,
        },
    ]
    page.tests = [
        {
            "file": "test_model",
            "name": "test_a_thing[x|y]",
            "outcome": "failed",
            "seconds": 1.0,
            "figures": {"gap": "1e-6"},
            "words": "assert 1 == 2\n```",
        }
    ]
    page.write()
    text = page.path.read_text()
    assert (
        "| 7b | 18 of 32 | 3.90B | 1 x 4096 | eager | recomputed | 9,000 | 200 | 25.0% | 3 s |"
        in text
    )
    assert "| training 7b, 18 of 32 layers, recomputed | 70.00 | 56.00 | +25.0% |" in text
    assert "| 1b | 16 | 128 + 128 | a graph | 5,000 | 3.20 ms | 1.00 TB/s | 25.0% |" in text
    assert "| model | a thing[x\\|y] | failed | 1.0 s | gap: 1e-6 |" in text
    assert text.count("```") % 2 == 0
    assert page.failures == ["test_model: test_a_thing[x|y]"]
    assert "NVIDIA H100" in text


def test_a_test_tells_of_itself(tmp_path: Path) -> None:
    """What tests/gpu writes for the page, here of tests that skip themselves or cannot be
    imported."""
    report = tmp_path / "report.jsonl"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "tests/gpu/test_gpu_model.py",
        "-q",
        "--confcutdir=tests/gpu",
        "-p",
        "no:cacheprovider",
        "-k",
        "one_query",
    ]
    environment = {
        **os.environ,
        "LLAMA2_GPU_REPORT": str(report),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    subprocess.run(
        command,
        cwd=ROOT,
        env={**environment, "LLAMA2_GPU_TINY": "1"},
        capture_output=True,
        check=True,
    )
    rows = [json.loads(line) for line in report.read_text().splitlines()]
    assert [(row["file"], row["outcome"]) for row in rows] == [("test_gpu_model", "passed")] * 3
