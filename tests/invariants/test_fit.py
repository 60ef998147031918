"""What must hold whatever is trained: exact accumulation, exact resumption, and stops that lose
nothing."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from toys import ALONE, Rows, llama, noisy, weights

from llama2 import devices
from llama2.batches import count_tokens
from llama2.errors import UserError
from llama2.runs import Stopped
from llama2.train import hooks, optim, state
from llama2.train.learner import Learner
from llama2.train.loop import Hook, Loss, Plan, fit
from llama2.train.objectives import next_token

PLAN = Plan(max_steps=9, warmup_steps=2, save_every=3, validate_every=4, log_every=2)
FAST = optim.AdamW(learning_rate=1e-2)


class Reports(Hook):
    def __init__(self) -> None:
        self.seen = []

    def on_step(self, training, report):
        self.seen.append(report)


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_micro_batches_change_nothing():
    results = []
    for micro in (8, 3, 1):
        model, reports = llama(), Reports()
        fit(Learner(model, ALONE, FAST), Rows(8, micro), next_token, Plan(max_steps=3), [reports])
        results.append((weights(model), reports.seen))

    for other, seen in results[1:]:
        for name, value in results[0][0].items():
            torch.testing.assert_close(other[name], value, rtol=1e-5, atol=1e-6, msg=name)

        for mine, first in zip(seen, results[0][1]):
            assert mine.weight == first.weight
            assert mine.tokens == first.tokens == 8 * 12
            assert mine.sums["train/loss"] == pytest.approx(first.sums["train/loss"], rel=1e-5)
            assert mine.gradient_norm == pytest.approx(first.gradient_norm, rel=1e-4)


@pytest.mark.parametrize("clip", [0.01, 100.0])
def test_gradients_are_divided_by_the_weight_and_clipped(clip):
    model = torch.nn.Linear(3, 1, bias=False)
    with torch.no_grad():
        model.weight.zero_()

    def objective(model, batch) -> Loss:
        return Loss(model(batch["x"]).sum(), torch.tensor(4.0))

    class Once(Rows):
        def __next__(self):
            return [{"x": torch.tensor([[3.0, 0.0, 4.0]])}, {"x": torch.tensor([[3.0, 0.0, 4.0]])}]

    learner, reports = Learner(model, ALONE), Reports()
    learner.optimizer = torch.optim.SGD([{"params": [model.weight], "peak": 1.0, "lr": 1.0}])
    fit(learner, Once(), objective, Plan(max_steps=1, schedule="constant", clip=clip), [reports])
    mean = torch.tensor([[3.0, 0.0, 4.0]]) * 2 / 8  # two micro-batches, each of weight 4
    expected = mean * min(1.0, clip / float(mean.norm()))
    torch.testing.assert_close(model.weight.detach(), -expected)
    assert reports.seen[0].gradient_norm == pytest.approx(1.25)


class Pair(torch.nn.Module):
    """Two towers of which one has far larger gradients, and a parameter that belongs to neither."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.actor, self.critic = torch.nn.Linear(4, 3), torch.nn.Linear(4, 1)
        self.scale = torch.nn.Parameter(torch.ones(1))


def pair_loss(model, batch) -> Loss:
    x = batch["x"]
    total = model.actor(x).square().sum() + 500 * (model.scale * model.critic(x)).square().sum()
    return Loss(total, torch.tensor(float(len(x))))


class Numbers(Rows):
    def __next__(self):
        self.step += 1
        x = torch.randn(6, 4, generator=torch.Generator().manual_seed(self.step))
        return [{"x": part} for part in x.split(2)]


def test_parts_clipped_apart_are_what_separate_clipping_makes_of_them():
    """Three updates against torch's own `clip_grad_norm_`, once for each part."""
    model, reports = Pair(), Reports()
    learner = Learner(model, ALONE, FAST, apart=("actor.", "critic."))
    fit(learner, Numbers(), pair_loss, Plan(max_steps=3, schedule="constant", clip=0.5), [reports])

    other = Pair()
    optimizer, source = Learner(other, ALONE, FAST).optimizer, Numbers()

    for step in range(3):
        optimizer.zero_grad()
        batch = {"x": torch.cat([part["x"] for part in next(source)])}
        loss = pair_loss(other, batch)
        (loss.total / loss.weight).backward()
        norms = {
            name: float(torch.nn.utils.clip_grad_norm_(part, 0.5))
            for name, part in (
                ("actor.", other.actor.parameters()),
                ("critic.", other.critic.parameters()),
                ("", [other.scale]),
            )
        }
        optimizer.step()
        seen = reports.seen[step]
        assert seen.gradient_norms == pytest.approx(norms, rel=1e-4)
        assert seen.gradient_norm == pytest.approx(
            sum(norm**2 for norm in norms.values()) ** 0.5, rel=1e-4
        )
        assert norms["critic."] > 50 * norms["actor."] > 50 * 0.5

    for name, value in weights(other).items():
        torch.testing.assert_close(weights(model)[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_a_part_moves_as_if_it_were_alone():
    """However large the other's gradient is."""

    def alone(model, batch) -> Loss:
        return Loss(model.actor(batch["x"]).square().sum(), torch.tensor(float(len(batch["x"]))))

    plan, moved = Plan(max_steps=3, schedule="constant"), []
    for objective, apart in ((alone, ()), (pair_loss, ("critic.", "scale")), (pair_loss, ())):
        model = Pair()
        fit(Learner(model, ALONE, FAST, apart=apart), Numbers(), objective, plan)
        moved.append(torch.cat([p.detach().flatten() for p in model.actor.parameters()]))

    torch.testing.assert_close(moved[1], moved[0], rtol=1e-6, atol=1e-7)
    # clipped together, one chokes the other
    assert not torch.allclose(moved[2], moved[0], rtol=1e-3)


def test_the_part_whose_gradient_is_not_finite_is_named():
    def broken(model, batch) -> Loss:
        loss = pair_loss(model, batch)
        model.critic.weight.register_hook(lambda gradient: gradient * float("nan"))
        return loss

    with pytest.raises(
        UserError, match=r"step 1: the gradient norm of the critic is not finite \(loss "
    ):
        fit(
            Learner(Pair(), ALONE, FAST, apart=("actor.", "critic.")),
            Numbers(),
            broken,
            Plan(max_steps=1),
        )


def test_the_learning_rate_follows_the_plan():
    reports, plan = Reports(), Plan(max_steps=6, warmup_steps=2)
    fit(Learner(llama(), ALONE, FAST), Rows(), next_token, plan, [reports])
    assert [r.learning_rate for r in reports.seen] == [1e-2 * plan.scale_rate(s) for s in range(6)]
    assert reports.seen[-1].learning_rate == pytest.approx(1e-3)


def test_a_step_without_weight_changes_nothing():
    def objective(model, batch) -> Loss:
        return next_token(model, batch | {"weights_BT": batch["weights_BT"] * 0})

    model = llama()
    before, reports = weights(model), Reports()
    fit(
        Learner(model, ALONE, FAST),
        Rows(),
        objective,
        Plan(max_steps=2, schedule="constant"),
        [reports],
    )
    assert_same(before, weights(model))
    assert [r.weight for r in reports.seen] == [0, 0]


def test_training_ends_with_its_source_and_learns():
    reports = Reports()

    class Same(Rows):
        def __next__(self):
            step, batch = self.step, super().__next__()
            self.step = 0
            batch = super().__next__()
            self.step = step + 1

            return batch

    fit(
        Learner(llama(), ALONE, FAST),
        Same(steps=40),
        next_token,
        Plan(schedule="constant"),
        [reports],
    )
    assert len(reports.seen) == 40
    losses = [r.sums["train/loss"] / r.weight for r in reports.seen]
    assert losses[0] == pytest.approx(np.log(37), abs=0.1)
    assert losses[-1] < 0.5 * losses[0]


# --- resumption ---


def evaluate(model) -> dict[str, float]:
    torch.rand(3), random.random()  # an evaluation that draws numbers must not disturb training
    return {"valid/loss": sum(float(p.square().sum()) for p in model.parameters())}


def run_once(run: Path, *extra: Hook, save_model=None) -> tuple[dict[str, torch.Tensor], list[str]]:
    """One attempt at the whole run; returns its weights and the lines it logged."""
    torch.manual_seed(5)
    model, lines = llama(), []

    def write(step, metrics):
        timeless = {k: v for k, v in metrics.items() if not k.startswith("perf/")}
        lines.append(json.dumps([step, timeless]))

    fit(
        Learner(model, ALONE, FAST),
        Rows(8, 3),
        noisy,
        PLAN,
        [
            hooks.Log(write),
            hooks.Validate(evaluate, "valid/loss"),
            hooks.Checkpoint(run, save_model),
            *extra,
        ],
    )
    return weights(model), lines


class Crash(Hook):
    """Fails once, at a given step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_boundary(self, training):
        if training.learner.step == self.step:
            self.step = -1
            raise KeyboardInterrupt


@pytest.mark.parametrize("step", [1, 3, 5, 8])
def test_a_resumed_run_is_the_run_never_stopped(tmp_path, step):
    expected, lines = run_once(tmp_path / "whole", Crash(-1))
    crash = Crash(step)
    with pytest.raises(KeyboardInterrupt):
        run_once(tmp_path / "broken", crash)

    torch.manual_seed(99)
    result, rest = run_once(tmp_path / "broken", crash)
    assert_same(expected, result)
    # metrics too, those of windows begun before the crash included
    assert rest == lines[-len(rest) :]


def test_the_random_state_of_every_generator_is_restored():
    before = state.get_random_state(ALONE.device)
    drawn = torch.rand(2).tolist(), np.random.rand(2).tolist(), random.random(), random.gauss(0, 1)
    state.set_random_state(before, ALONE.device)
    assert drawn == (
        torch.rand(2).tolist(),
        np.random.rand(2).tolist(),
        random.random(),
        random.gauss(0, 1),
    )


def test_validation_does_not_disturb_training(tmp_path):
    with_validation, _ = run_once(tmp_path)
    torch.manual_seed(5)
    model = llama()
    fit(Learner(model, ALONE, FAST), Rows(8, 3), noisy, PLAN)
    assert_same(with_validation, weights(model))


def test_a_finished_run_does_not_train_again(tmp_path):
    expected, _ = run_once(tmp_path, Reports())
    reports = Reports()
    result, _ = run_once(tmp_path, reports)
    assert_same(expected, result)
    assert reports.seen == []


@pytest.fixture
def at_a_terminal():
    """Ctrl-C and SIGHUP as Python starts with them: a process in the background inherits that they
    are ignored."""
    before = (
        signal.signal(signal.SIGINT, signal.default_int_handler),
        signal.signal(signal.SIGHUP, signal.SIG_DFL),
    )
    yield
    signal.signal(signal.SIGINT, before[0])
    signal.signal(signal.SIGHUP, before[1])


def test_a_second_ctrl_c_does_not_wait(tmp_path, at_a_terminal):
    class Twice(Hook):
        def on_step(self, training, report):
            if report.step == 2:
                os.kill(os.getpid(), signal.SIGINT)
                assert training.stop_requested
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run_once(tmp_path, hooks.Signals(), Twice())

    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert state.find_latest(tmp_path) is None


def test_ctrl_c_that_is_ignored_stays_ignored(tmp_path, at_a_terminal):
    class Send(Hook):
        def on_step(self, training, report):
            os.kill(os.getpid(), signal.SIGINT)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    run_once(tmp_path, hooks.Signals(), Send())
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT])
def test_signals_save_and_stop_at_the_step_boundary(tmp_path, number, at_a_terminal):
    class Send(Hook):
        def on_step(self, training, report):
            if report.step == 4:
                os.kill(os.getpid(), number)

    expected, _ = run_once(tmp_path / "whole", hooks.Signals(), Crash(-1))
    before = signal.getsignal(number)

    with pytest.raises(Stopped) as stopped:
        run_once(tmp_path / "stopped", hooks.Signals(), Send())

    assert stopped.value.exit_code == (130 if number == signal.SIGINT else 0)
    assert stopped.value.step == 5  # the signal arrived after step 4 was decided
    assert stopped.value.checkpoint == state.find_latest(tmp_path / "stopped")
    assert signal.getsignal(number) == before
    result, _ = run_once(tmp_path / "stopped", hooks.Signals(), type("Send", (Hook,), {})())
    assert_same(expected, result)


CHILD = """
import os, signal, sys
from pathlib import Path
import torch
from llama2.train import state
import test_fit
run, place = Path(sys.argv[1]), sys.argv[2]
def die(*_): os.kill(os.getpid(), signal.SIGKILL)
if place == "write":  # in the middle of the second checkpoint, its files half written
    save, count = torch.save, []
    def half(value, file):
        count.append(1)
        save(value, file)
        if len(count) == 2:
            file.truncate(1000)
            die()
    torch.save = half
if place == "rename":  # the second checkpoint is whole but has not got its name
    rename, count = os.rename, []
    def before(a, b):
        count.append(1)
        die() if len(count) == 2 else rename(a, b)
    os.rename = before
if place == "prune":
    rmtree = state.shutil.rmtree
    state.shutil.rmtree = lambda path, **options: die() if ".discarded" in str(path) else rmtree(path, **options)
test_fit.run_once(run)
"""


@pytest.mark.parametrize(("place", "steps"), [("write", [3]), ("rename", [3]), ("prune", [6, 9])])
def test_kill_minus_nine_loses_no_complete_checkpoint(tmp_path, place, steps):
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])
    }
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path / "killed"), place],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert child.returncode == -signal.SIGKILL, child.stderr
    assert [step for step, _ in state.list_checkpoints(tmp_path / "killed")] == steps
    result, _ = run_once(tmp_path / "killed")
    expected, _ = run_once(tmp_path / "whole")
    assert_same(expected, result)
    left = sorted(p.name for p in (tmp_path / "killed" / "checkpoints").iterdir())
    assert left == ["step-00000006", "step-00000009"]


# --- checkpoints ---


def test_checkpoints_hold_the_model_and_only_the_newest_are_kept(tmp_path):
    run_once(tmp_path, save_model=lambda d: (d / "config.json").write_text("{}"))
    found = state.list_checkpoints(tmp_path)
    assert [step for step, _ in found] == [6, 9]
    assert state.find_latest(tmp_path) == found[-1][1]

    for _, path in found:
        assert {p.name for p in path.iterdir()} == {"config.json", "trainer", "COMPLETE"}


def test_unfinished_checkpoints_do_not_count(tmp_path):
    assert state.find_latest(tmp_path) is None
    for name, complete in (
        ("step-00000002", True),
        ("step-00000007", False),
        (".partial-step-00000009", True),
        ("step-10", True),
    ):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        if complete:
            (tmp_path / "checkpoints" / name / "COMPLETE").touch()

    assert state.find_latest(tmp_path).name == "step-00000002"


def _flip(file):
    """One bit in the middle of the numbers."""
    content = bytearray(file.read_bytes())
    content[len(content) * 3 // 10] ^= 1 << 6
    file.write_bytes(content)


DAMAGES = {
    "cut": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "emptied": lambda file: file.write_bytes(b""),
    "flipped": _flip,
    "missing": Path.unlink,
}


@pytest.mark.parametrize("name", ["trainer/state.pt", "COMPLETE"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(tmp_path, capsys, damage, name):
    expected, _ = run_once(tmp_path / "whole")
    run_once(tmp_path / "run")
    newest = state.find_latest(tmp_path / "run")
    DAMAGES[damage](newest / name)
    capsys.readouterr()
    result, lines = run_once(tmp_path / "run")
    assert_same(expected, result)
    said = capsys.readouterr().err

    # as versions before wrote it; as a crash leaves it
    if name == "COMPLETE" and damage in ("emptied", "missing"):
        assert said == ""
    else:
        assert (
            f"{newest / name}:" in said
            or f"{newest / 'trainer/state.pt'}: truncated or damaged (" in said
        )
        assert "damaged" in said or "not valid JSON" in said
        assert said.endswith("; training goes on from step 6\n")

    # lines are logged at even steps and the end
    again = [] if not said and damage == "emptied" else [8, 9]
    assert sorted({json.loads(line)[0] for line in lines}) == again
    assert state.find_newest_whole(tmp_path / "run", ALONE).name == "step-00000009"  # written anew


@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize("damage", ["cut", "emptied", "flipped", "missing"])
def test_the_only_checkpoint_damaged_is_named_with_its_cure(tmp_path, damage, marked):
    run_once(tmp_path)
    before, newest = (path for _, path in state.list_checkpoints(tmp_path))
    shutil.rmtree(before)
    DAMAGES[damage](newest / "trainer/state.pt")

    if not marked:
        (newest / "COMPLETE").write_bytes(b"")

    with pytest.raises(
        UserError, match=r"step-00000009/trainer/state.pt: truncated or damaged \("
    ) as error:
        run_once(tmp_path)

    assert error.value.cure == f"delete {newest}: the same command goes on from the beginning"


def test_lost_metrics_are_named(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    run_once(tmp_path)
    capsys.readouterr()
    run_once(tmp_path)
    assert capsys.readouterr().err == ""
    (tmp_path / "metrics.jsonl").write_text("")
    run_once(tmp_path)
    assert capsys.readouterr().err == (
        f"{tmp_path}/metrics.jsonl: damaged: lines logged before step 9 are lost, and "
        "the report's curves lack them\n"
    )


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path, monkeypatch):
    save = torch.save

    def full(value, file):
        if "step-00000006" in file.name:
            with open("/dev/full", "wb") as file:
                save(value, file)

        save(value, file)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match="no space left on the device"):
        run_once(tmp_path)

    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000003"]


# --- stops ---


@pytest.mark.parametrize("what", ["loss", "gradient norm"])
def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(tmp_path, what):
    model = llama()
    seen = []

    def objective(model, batch) -> Loss:
        loss = next_token(model, batch)
        seen.append(weights(model))
        if len(seen) == 8:
            if what == "loss":
                loss.total = loss.total * float("nan")
            else:
                loss.total.register_hook(lambda gradient: gradient * float("inf"))

        return loss

    with pytest.raises(UserError) as error:
        fit(Learner(model, ALONE, FAST), Rows(), objective, PLAN, [hooks.Checkpoint(tmp_path)])

    cause, cure = error.value.cause, error.value.cure
    assert cause.startswith(f"step 8: the {what} is not finite (loss ")
    assert "learning rate" in cause
    assert "lower learning_rate" in cure
    assert str(state.find_latest(tmp_path)) in cure
    assert state.find_latest(tmp_path).name == "step-00000006"
    assert_same(seen[-1], weights(model))  # the bad update was not made


def test_early_stopping_keeps_the_best(tmp_path):
    values, kept = iter([3.0, 2.0, 2.5, 2.4, 1.0]), []
    validate = hooks.Validate(
        lambda model: {"v": next(values)}, "v", patience=2, keep_best=lambda: kept.append(1)
    )
    reports = Reports()
    plan = Plan(max_steps=20, validate_every=2)
    fit(
        Learner(llama(), ALONE, FAST),
        Rows(),
        next_token,
        plan,
        [validate, reports, hooks.Checkpoint(tmp_path)],
    )
    assert (validate.best, validate.best_step, len(kept), reports.seen[-1].step) == (2.0, 4, 2, 8)
    again = Reports()  # and it stays stopped
    fit(
        Learner(llama(), ALONE, FAST),
        Rows(),
        next_token,
        plan,
        [validate, again, hooks.Checkpoint(tmp_path)],
    )
    assert again.seen == []


def test_metrics_that_come_and_go_are_a_defect():
    def objective(model, batch) -> Loss:
        loss = next_token(model, batch)
        loss.metrics = {f"m{len(batch['tokens_BT'])}": loss.total.detach()}
        return loss

    with pytest.raises(ValueError, match="same metrics"):
        fit(Learner(llama(), ALONE), Rows(4, 3), objective, Plan(max_steps=1, schedule="constant"))


# --- what is shown ---


def test_logged_means_are_weighted_over_the_window():
    logged, reports = [], Reports()
    fit(
        Learner(llama(), ALONE, FAST),
        Rows(8, 3),
        noisy,
        Plan(max_steps=5, log_every=3),
        [
            reports,
            hooks.Log(lambda step, metrics: logged.append((step, metrics)), flops_per_token=1e6),
        ],
    )
    assert [step for step, _ in logged] == [3, 5]
    window = reports.seen[:3]
    loss = sum(r.sums["train/loss"] for r in window) / sum(r.weight for r in window)
    assert logged[0][1]["train/loss"] == pytest.approx(loss)
    assert logged[0][1]["train/grad_norm"] == window[-1].gradient_norm
    speed = sum(r.tokens for r in window) / sum(r.seconds for r in window)
    assert logged[0][1]["perf/tokens_per_second"] == pytest.approx(speed)
    assert "perf/mfu" not in logged[0][1]  # a CPU's peak is nobody's


def test_mfu_is_a_share_of_the_peak_and_never_above_it(monkeypatch):
    monkeypatch.setattr(devices, "is_exclusive", lambda device: True)
    logged = []
    for peak in (1e15, 1.0):
        monkeypatch.setattr(devices, "measure_peak", lambda device, precision, peak=peak: peak)
        fit(
            Learner(llama(), ALONE, FAST),
            Rows(),
            next_token,
            Plan(max_steps=2, log_every=2),
            [hooks.Log(lambda step, metrics: logged.append(metrics), flops_per_token=1e6)],
        )

    below, above = logged
    assert below["perf/mfu"] == pytest.approx(below["perf/tokens_per_second"] * 1e6 / 1e15)
    assert above["perf/mfu"] == 1.0


def test_tokens_are_counted_without_padding_and_over_interruptions(tmp_path):
    """Toy rows have 12 places, of which the loss mask says how many are trained; here the first
    three are read."""

    class Padded(Rows):
        def __next__(self):
            return [
                batch | {"read_B": torch.full((len(batch["tokens_BT"]),), 3)}
                for batch in super().__next__()
            ]

    def attempt(directory: Path, crash: Crash) -> Learner:
        learner = Learner(llama(), ALONE, FAST)
        fit(learner, Padded(8, 3), next_token, PLAN, [hooks.Checkpoint(directory), crash])
        return learner

    crash = Crash(5)
    with pytest.raises(KeyboardInterrupt):
        attempt(tmp_path, crash)

    resumed, source = attempt(tmp_path, crash), Rows(8, 3)
    under_loss = sum(int(batch["weights_BT"].sum()) for _ in range(9) for batch in next(source))
    assert (resumed.tokens, resumed.trained) == (9 * 8 * 3, under_loss)
    assert count_tokens({"tokens_BT": torch.zeros(4, 7), "read_B": torch.tensor([7, 2, 3, 0])}) == (
        12,
        3,
    )


def test_progress_without_a_terminal_is_a_few_plain_lines(capsys):
    fit(
        Learner(llama(), ALONE, FAST),
        Rows(),
        next_token,
        Plan(max_steps=12),
        [hooks.ProgressBar("pretrain")],
    )
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("pretrain 12/12: ETA 0:00, loss ")
    assert lines[0].endswith("tokens/s")


def test_the_bar_shows_eta_speed_and_mfu(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr(devices, "is_exclusive", lambda device: True)
    fit(
        Learner(llama(), ALONE, FAST),
        Rows(),
        next_token,
        Plan(max_steps=3),
        [hooks.ProgressBar("sft", 1e6)],
    )
    text = capsys.readouterr().err
    assert all(part in text for part in ("sft", "3/3", "ETA 0:00", "tokens/s", "MFU"))


def test_tensorboard_gets_every_published_metric(tmp_path):
    pytest.importorskip("tensorboard")
    fit(
        Learner(llama(), ALONE, FAST),
        Rows(),
        next_token,
        Plan(max_steps=4, log_every=2),
        [hooks.Log(lambda step, metrics: None), hooks.TensorBoard(tmp_path, ALONE)],
    )
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [2, 4]


def test_without_a_compiler_training_is_eager_and_says_so(monkeypatch, capsys):
    monkeypatch.setattr("llama2.train.learner.shutil.which", lambda name: None)
    model = llama()
    assert Learner(model, ALONE, compile=True).forward is model
    assert "no C++ compiler found" in capsys.readouterr().err
