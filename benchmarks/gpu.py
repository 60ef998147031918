"""All that needs a GPU, in less than eight minutes: the tests, the benchmarks, and the page that
tells of both.

    python benchmarks/gpu.py [--page PATH] [--wheels FOLDER] [--minutes N] [--tiny] [--empty]

`make gpu` calls it. The interpreter that runs it is used as it is: PyTorch is neither installed nor
replaced, and what else is missing is put beside it into `.gpu/`, from a folder of wheels (`make
gpu-wheels` fills one) or from the package index, if there is either. What cannot be had is named on
the page, and whatever runs without it runs. Every part is a process of its own with a limit of
time: its figures, or its last words, stand on the page as soon as they are known.

Without a CUDA device it says so and does nothing. `--tiny` (or LLAMA2_GPU_TINY=1) goes the whole
way on the CPU, as small as can be; `--empty` writes the page of a project that has seen no GPU.
Only the standard library is needed here.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from gpu_page import Page

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
SITE = ROOT / ".gpu" / str(sys.implementation.cache_tag)  # packages that this Python misses
NEEDED = {
    "numpy": "numpy",
    "sentencepiece": "sentencepiece",
    "safetensors": "safetensors",
    "pydantic": "pydantic",
    "tyro": "tyro",
    "yaml": "PyYAML",
    "rich": "rich",
    "pytest": "pytest",
    "pytest_timeout": "pytest-timeout",
}
# file: seconds at most
TESTS = {
    "test_gpu_model": 90,
    "test_gpu_engine": 60,
    "test_gpu_graphs": 60,
    "test_training": 60,
    "test_command": 60,
}
JOBS = {
    "ceilings": 40,
    "training 1b": 60,
    "generation 1b": 45,
    "training 7b": 60,
    "generation 7b": 60,
    "ppo": 60,
    "training 1b compiled": 110,
    "training 7b, activations kept": 45,
    "training 7b compiled": 90,
}
TINY_JOBS = ("ceilings", "training 1b", "training 7b", "generation 1b", "ppo")
LEAST = 5.0  # seconds for which no part is started

DEVICE = """
import json, platform, sys, torch
found = {"python": platform.python_version(), "torch": torch.__version__, "cuda": str(torch.version.cuda)}
if torch.cuda.is_available():
    one = torch.cuda.get_device_properties(0)
    found |= {"device": one.name, "memory": f"{one.total_memory / 2**30:.1f} GiB", "cudnn":
              str(torch.backends.cudnn.version()), "multiprocessors": str(one.multi_processor_count)}
try:
    import triton
    found["triton"] = triton.__version__
except ImportError:
    found["triton"] = "none"
print(json.dumps(found))
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "gpu.md")
    parser.add_argument(
        "--wheels", type=Path, default=ROOT / "wheels", help="a folder of wheels to install from"
    )
    parser.add_argument(
        "--minutes", type=float, default=7.5, help="after which nothing more is begun or goes on"
    )
    parser.add_argument(
        "--tiny", action="store_true", default=os.environ.get("LLAMA2_GPU_TINY") == "1"
    )
    parser.add_argument(
        "--empty", action="store_true", help="write the page of a project that no GPU has run"
    )
    arguments = parser.parse_args()

    if arguments.empty:
        Page(arguments.page).write()
        return 0

    end = time.monotonic() + 60 * arguments.minutes
    device = about_the_device()
    if "problem" in device or ("device" not in device and not arguments.tiny):
        print(
            f"no CUDA device ({device.get('problem') or 'torch ' + device['torch']}): nothing to run"
        )
        return 0

    page = Page(arguments.page, device, arguments.tiny, time.strftime("%Y-%m-%d", time.gmtime()))
    page.notes += provide(arguments.wheels, min(end, time.monotonic() + 90))
    page.write()
    run_all(page, end, arguments.tiny)
    page.finished = True
    page.write()
    print(
        f"\n{page.path}: {len(page.failures)} of {page.parts} parts failed"
        + "".join(f"\n  {name}" for name in page.failures)
    )

    return 1 if page.failures else 0


def run_all(page: Page, end: float, tiny: bool) -> None:
    """Tests, then benchmarks, until the time is up; the page grows with every figure."""
    begun = time.monotonic()
    files = {" ".join(TESTS): 400} if tiny else TESTS
    for names, seconds in files.items():
        tests(page, names.split(), min(seconds, end - time.monotonic()), tiny)

    for name in TINY_JOBS if tiny else JOBS:
        job(page, name, min(400 if tiny else JOBS[name], end - time.monotonic()), tiny)

    page.seconds = time.monotonic() - begun


# --- the machine ---
def about_the_device() -> dict[str, str]:
    """Names and versions; `problem` where this interpreter has no PyTorch that works."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", DEVICE],
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=120,
        )
        if done.returncode:
            return {
                "problem": f"{sys.executable} cannot import torch: {done.stderr.strip().splitlines()[-1]}"
            }

        found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        return {"problem": "importing torch takes more than two minutes"}

    if "device" in found:
        found["driver"] = driver()

    return found


def driver() -> str:
    """The version of NVIDIA's driver."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=20)
        return done.stdout.strip() or "unknown"
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"


def provide(wheels: Path, end: float) -> list[str]:
    """Install what is missing into `SITE` and put that on the path of every part; what is to be
    told of it."""
    missing = absent()
    if not missing:
        return []

    sys.path.append(str(SITE))
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(SITE), os.environ.get("PYTHONPATH")])
    )
    if not absent():
        return [f"Brought beside PyTorch: {', '.join(missing)}."]

    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--no-input",
        "--no-compile",
        "--target",
        str(SITE),
    ]
    found = [path for path in sorted(wheels.glob("*.whl")) if not here(path.name.split("-")[0])]
    if found:
        pip += ["--no-index", "--no-deps", "--upgrade", *map(str, found)]
    else:
        pip += ["--retries", "0", "--timeout", "5", *missing]

    said = finished(pip, end - time.monotonic())
    still = absent()
    told = [
        f"Brought beside PyTorch: {', '.join(missing)}, from {'wheels' if found else 'the package index'}."
    ]

    if still:
        told.append(
            f"Not there at all: {', '.join(still)}; what needs them fails below. "
            f"pip said: {said.strip().splitlines()[-1] if said.strip() else 'nothing'}"
        )

    return told


def absent() -> list[str]:
    """The packages that cannot be imported."""
    importlib.invalidate_caches()
    return [
        package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None
    ]


def here(distribution: str) -> bool:
    """Whether the machine has it: what is there is never replaced, and PyTorch never brought."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return bool(importlib.metadata.version(distribution))

    return distribution.lower() in ("torch", "triton") or distribution.lower().startswith("nvidia")


# --- the parts ---
def tests(page: Page, names: list[str], seconds: float, tiny: bool) -> None:
    """Some files of tests/gpu, each test a line of the page."""
    title = f"tests: {', '.join(names)}"
    if seconds < LEAST:
        page.fail(title, "not begun: the time was up")
        return

    print(f"== {title} (at most {seconds:.0f} s)", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.jsonl"
        # where tests/gpu/conftest.py tells of each test
        os.environ["LLAMA2_GPU_REPORT"] = str(report)
        report.touch()
        told = 0

        def hear(_: str = "") -> None:
            nonlocal told
            lines = report.read_text(encoding="utf-8").splitlines()
            if len(lines) > told:
                page.tests += [json.loads(line) for line in lines[told:]]
                told = len(lines)
                page.write()

        command = [
            sys.executable,
            "-m",
            "pytest",
            *(f"tests/gpu/{name}.py" for name in names),
            "-v",
            "--tb=short",
            "--confcutdir=tests/gpu",
            "-o",
            "addopts=",
            "-o",
            "filterwarnings=default",
            "-p",
            "no:cacheprovider",
            "--continue-on-collection-errors",
        ]
        said = finished(command, seconds, tiny, hear=hear)
        hear()

    page.parts += 1
    count = sum(one["outcome"] == "failed" for one in page.tests[len(page.tests) - told :])
    if said and not count:  # it did not end as tests do
        page.fail(title, said[-4000:])

    print(f"   {told} tests, {count} failed", flush=True)
    page.write()


def job(page: Page, name: str, seconds: float, tiny: bool) -> None:
    """One benchmark; each of its figures goes to the page as it comes."""
    if seconds < LEAST:
        page.fail(name, "not begun: the time was up")
        return

    print(f"== {name} (at most {seconds:.0f} s)", flush=True)
    command = [sys.executable, str(HERE / "gpu_jobs.py"), name, *(["--tiny"] if tiny else [])]

    def hear(line: str) -> None:
        try:
            found = json.loads(line)
        except ValueError:
            return

        page.figures.append(found)
        page.write()

    before = len(page.figures)
    said = finished(command, seconds, tiny, hear=hear)
    if said:
        page.fail(name, said[-4000:])

    page.parts += 1
    print(f"   {len(page.figures) - before} figures{', failed' if said else ''}", flush=True)
    page.write()


def finished(
    command: list[str],
    seconds: float,
    tiny: bool = False,
    hear: Callable[[str], None] | None = None,
) -> str:
    """Run a command for so many seconds at most; "" if it went well, else what it said, and why it
    ended."""
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": os.pathsep.join(path)}
    if tiny:
        environment |= {"LLAMA2_DEVICE": "cpu", "LLAMA2_GPU_TINY": "1"}

    begun, lines = time.monotonic(), list[str]()
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        text=True,
        encoding="utf-8",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    assert process.stdout is not None
    timer = threading.Timer(max(seconds, 0.1), end, [process])
    timer.start()

    try:
        for line in process.stdout:
            lines.append(line)
            if hear is not None:
                print("  ", line, end="", flush=True)
                hear(line)

        code = process.wait()
    finally:
        timer.cancel()
        end(process)
        process.stdout.close()

    late = time.monotonic() - begun >= seconds
    if code == 0 and not late:
        return ""

    return "".join(lines) + ("\n(ended: its time was up)" if late else f"\n(exit status {code})")


def end(process: subprocess.Popen[str]) -> None:
    """End a part and what it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
