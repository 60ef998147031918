"""Training on a GPU: the steps of a CPU, whatever the micro-batches, and what a checkpoint brings
back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from shapes import batch, build, distance
from torch import Tensor

from llama2.batches import Batch
from llama2.devices import Precision
from llama2.formats import checkpoint
from llama2.ranks import Ranks
from llama2.train import hooks, optim, parallel, state
from llama2.train.learner import Learner
from llama2.train.loop import Hook, Plan, Report, TrainingState, fit
from llama2.train.objectives import make_ranking_loss, next_token

FAST = optim.AdamW(learning_rate=1e-3)


class Steps:
    """Random rows, another batch every step, in micro-batches of `micro` rows."""

    def __init__(self, micro: int = 3, same: bool = False) -> None:
        self.micro, self.same, self.step = micro, same, 0

    def __next__(self) -> list[Batch]:
        self.step += 1
        data = batch(True, 0 if self.same else self.step)
        return [
            dict(zip(data, parts))
            for parts in zip(*(value.split(self.micro) for value in data.values()))
        ]

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]


class Losses(Hook):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_step(self, training: TrainingState, report: Report) -> None:
        self.seen.append(report.sums["train/loss"] / report.weight)


def trained(
    device: torch.device,
    steps: int = 4,
    *,
    micro: int = 3,
    same: bool = False,
    extra: tuple[Hook, ...] = (),
    precision: Precision = "fp32",
    checkpointing: bool = False,
) -> tuple[Learner, list[float]]:
    model, losses = build(scale=1.0).to(device), Losses()
    model.model.gradient_checkpointing = checkpointing
    learner = Learner(model, Ranks(device), FAST, precision=precision)
    fit(
        learner,
        Steps(micro, same),
        next_token,
        Plan(max_steps=steps, schedule="constant"),
        [*extra, losses],
    )

    return learner, losses.seen


def weights(learner: Learner) -> dict[str, Tensor]:
    return {
        name: value.detach().float().cpu().clone()
        for name, value in learner.model.state_dict().items()
    }


def assert_same(learner: Learner, other: Learner, tolerance: float) -> float:
    mine, others = weights(learner), weights(other)
    worst = max(distance(mine[name], others[name]) for name in others)
    assert worst < tolerance

    return worst


def test_steps_equal_those_of_the_cpu(device, monkeypatch, record_property) -> None:
    here, losses = trained(device)
    monkeypatch.setenv("LLAMA2_DEVICE", "cpu")
    there, expected = trained(torch.device("cpu"))
    assert losses == pytest.approx(expected, rel=1e-4)
    record_property(
        "weights after 4 steps, largest relative distance", f"{assert_same(here, there, 1e-3):.1e}"
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_micro_batches_equal_the_whole_batch(device, precision) -> None:
    whole, losses = trained(device, precision=precision)
    parts, split = trained(device, micro=1, precision=precision)
    assert split == pytest.approx(losses, rel=1e-4 if precision == "fp32" else 2e-2)
    assert_same(parts, whole, 1e-3 if precision == "fp32" else 2e-2)


def test_recomputed_activations_change_nothing(device) -> None:
    plain, losses = trained(device)
    again, found = trained(device, checkpointing=True)
    assert found == pytest.approx(losses, rel=1e-5)
    assert_same(again, plain, 1e-3)


def test_bf16_learns_into_fp32_weights(device, record_property) -> None:
    learner, losses = trained(device, 12, same=True, precision="bf16")
    record_property("loss, first and last of 12 steps", f"{losses[0]:.3f} {losses[-1]:.3f}")
    assert losses[-1] < losses[0] - 0.3
    assert all(parameter.dtype == torch.float32 for parameter in learner.model.parameters())
    moments = learner.optimizer.state[learner.model.head_weight]["exp_avg"]
    assert (moments.dtype, moments.device.type) == (torch.float32, device.type)


def test_a_resumed_run_goes_on_where_it_was(device, tmp_path: Path, record_property) -> None:
    straight, losses = trained(device, 6)
    _, first = trained(device, 3, extra=(hooks.Checkpoint(tmp_path),))
    assert state.find_latest(tmp_path) is not None
    resumed, rest = trained(device, 6, extra=(hooks.Checkpoint(tmp_path),))
    assert first + rest == pytest.approx(losses, rel=1e-5)
    record_property(
        "weights, largest relative distance", f"{assert_same(resumed, straight, 1e-3):.1e}"
    )


def test_random_states_come_back(device) -> None:
    before = state.get_random_state(device)
    drawn = torch.rand(5, device=device), torch.rand(5)
    state.set_random_state(before, device)

    for one, other in zip((torch.rand(5, device=device), torch.rand(5)), drawn):
        assert torch.equal(one, other)


def test_a_saved_model_comes_back_bit_for_bit(device, tmp_path: Path) -> None:
    model = build().to(device)
    checkpoint.save(model, tmp_path)
    again = checkpoint.load(tmp_path, device=device)

    for (name, one), other in zip(
        model.state_dict().items(), again.state_dict().values(), strict=True
    ):
        assert torch.equal(one, other), name

    half = checkpoint.load(tmp_path, dtype=torch.bfloat16, device=device)
    assert {(p.dtype, p.device.type) for p in half.parameters()} == {(torch.bfloat16, device.type)}


def test_the_ranking_loss_equals_the_cpus(device, monkeypatch) -> None:
    from llama2.model.scorer import Scorer

    random = torch.Generator().manual_seed(0)
    data = {
        "tokens_BT": torch.randint(3, 512, (6, 40), generator=random),
        "lengths_B": torch.randint(1, 41, (6,), generator=random),
        "degrees_P": torch.tensor([0, 1, 3]),
        "safe_B": torch.tensor([1, 0, -1, 0, 1, -1]),
        "weights_P": torch.tensor([1.0, 1.0, 0.0]),
    }
    found = []

    for where in (device, torch.device("cpu")):
        scorer = Scorer(build().config, 5).to(where)
        loss = make_ranking_loss("large", 0.5)(
            scorer, {name: value.to(where) for name, value in data.items()}
        )
        found.append(
            [float(value.detach()) for value in (loss.total, loss.weight, *loss.metrics.values())]
        )

    assert found[0] == pytest.approx(found[1], rel=1e-3, abs=1e-4)


def test_one_rank_under_fsdp_trains_what_none_does(device, tmp_path: Path, record_property) -> None:
    """FSDP2 over one rank: its all-gathers and reduce-scatters run, on NCCL where there is a
    GPU."""
    import torch.distributed as dist

    from llama2.generate.engine import Engine
    from llama2.generate.sampling import Sampling

    plain, losses = trained(device)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=f"file://{tmp_path}/meet",
        rank=0,
        world_size=1,
        device_id=device if device.type == "cuda" else None,
    )

    try:
        ranks = Ranks.of_group(device)
        model, seen = parallel.shard(build(scale=1.0), ranks), Losses()
        assert parallel.is_sharded(model)
        learner = Learner(model, ranks, FAST)
        fit(learner, Steps(), next_token, Plan(max_steps=4, schedule="constant"), [seen])
        full = {name: value.float() for name, value in learner.state_dict()["model"].items()}
        engine = Engine(model, slots=2, precision="fp32")  # type: ignore[arg-type]
        ((answer,),) = engine.generate([[3, 4, 5]], Sampling(temperature=0, max_tokens=4))
    finally:
        dist.destroy_process_group()

    expected = weights(plain)
    worst = max(distance(full[name].cpu(), expected[name]) for name in expected)
    record_property("weights, largest relative distance", f"{worst:.1e}")
    assert seen.seen == pytest.approx(losses, rel=1e-4)
    assert worst < 1e-3
    assert len(answer.tokens) == 4
