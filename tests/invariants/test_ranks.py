"""Two ranks must train what one would: replicated or sharded, resumed or not, stopped by whichever
rank."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from toys import ALONE, CONFIG, Rows, llama, weights

from llama2 import ranks as ranks_module
from llama2.errors import UserError
from llama2.model.llama import Llama, LlamaConfig
from llama2.model.rope import RopeScaling
from llama2.ranks import Ranks
from llama2.runs import Stopped
from llama2.train import hooks, optim, parallel, state
from llama2.train.learner import Learner
from llama2.train.loop import Hook, Plan, fit
from llama2.train.objectives import next_token

WORLD = 2
FAST = optim.AdamW(learning_rate=1e-2)
PLAN = Plan(max_steps=6, warmup_steps=2, save_every=2, log_every=2, clip=0.02)
RELATIVE = replace(
    CONFIG,
    head_dim=12,
    attention_bias=True,
    attention_output_bias=True,
    rope_scaling=RopeScaling("yarn", 4.0, 8),
    tie_word_embeddings=True,
)
APART = ("model.layers.0.", "lm_head.")


def _child(case, rank: int, directory: Path) -> None:
    os.environ["LLAMA2_DEVICE"] = "cpu"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{directory}/meet", rank=rank, world_size=WORLD
    )

    try:
        case(directory, Ranks.of_group(torch.device("cpu")))
    except BaseException:
        (directory / f"failure-{rank}").write_text(traceback.format_exc())
        os._exit(1)  # no farewell: the other rank may be waiting in a collective

    dist.barrier()
    ranks_module.exit_now()


def together(case, directory: Path) -> None:
    """Run `case(directory, ranks)` on two gloo ranks; the assertions inside it are the test."""
    directory.mkdir(exist_ok=True)
    spawn = multiprocessing.get_context("spawn")
    processes = [
        spawn.Process(target=_child, args=(case, rank, directory)) for rank in range(WORLD)
    ]

    for process in processes:
        process.start()

    for process in processes:
        process.join(240)

    alive = [process for process in processes if process.is_alive()]
    for process in alive:
        process.kill()

    failures = "\n".join(file.read_text() for file in sorted(directory.glob("failure-*")))
    assert not failures, failures
    assert not alive, "a rank hangs"
    assert [process.exitcode for process in processes] == [0] * WORLD


def learner(
    how: str, ranks: Ranks, config: LlamaConfig = CONFIG, apart: tuple[str, ...] = APART
) -> Learner:
    with torch.device("meta" if how == "shard" and ranks.rank else "cpu"):
        # all must take rank 0's weights, a shard's other ranks need none
        model = Llama(config, seed=ranks.rank)

    spread = parallel.shard if how == "shard" else parallel.replicate
    return Learner(spread(model, ranks), ranks, FAST, apart=apart)


class Reports(Hook):
    def __init__(self) -> None:
        self.seen = []

    def on_step(self, training, report):
        self.seen.append(report)


class Crash(Hook):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_boundary(self, training):
        if training.learner.step == self.step:
            self.step = -1
            raise KeyboardInterrupt


def assert_like_one(trained: Learner, reports: Reports, directory: Path) -> None:
    full = trained.state_dict()["model"]
    if trained.ranks.is_main:
        expected, seen = torch.load(directory / "alone.pt", weights_only=False)
        for name, value in expected.items():
            torch.testing.assert_close(full[name], value, rtol=1e-5, atol=1e-5, msg=name)

        for mine, one in zip(reports.seen, seen, strict=True):
            assert mine.weight == one.weight
            assert (mine.tokens, mine.trained) == (one.tokens, one.trained)
            assert mine.sums["train/loss"] == pytest.approx(one.sums["train/loss"], rel=1e-5)
            assert mine.gradient_norms == pytest.approx(one.gradient_norms, rel=1e-4)
            assert len(one.gradient_norms) == 3
            assert min(one.gradient_norms.values()) > PLAN.clip  # every part is clipped


def trained_together(directory: Path, ranks: Ranks) -> None:
    for how in ("replicate", "shard"):
        trained, reports = learner(how, ranks), Reports()
        assert parallel.is_sharded(trained.model) == (how == "shard")
        fit(trained, Rows(8, 2, ranks=ranks), next_token, PLAN, [reports])
        assert_like_one(trained, reports, directory)

    fit(
        trained,
        Rows(8, 2, ranks=ranks),
        next_token,
        PLAN.model_copy(update={"max_steps": 7, "total_steps": 7}),
    )
    uneven = Rows(3, 1, ranks=ranks)  # two rows here, one there
    with pytest.raises(ValueError, match="same number of micro-batches"):
        fit(trained, uneven, next_token, PLAN.model_copy(update={"max_steps": 8}))


def relative_trained_together(directory: Path, ranks: Ranks) -> None:
    for how in ("replicate", "shard"):
        trained = learner(how, ranks, RELATIVE, ())
        fit(trained, Rows(8, 2, ranks=ranks), next_token, PLAN)
        full = trained.state_dict()["model"]
        if ranks.is_main:
            for name, value in torch.load(directory / "alone.pt").items():
                torch.testing.assert_close(full[name], value, rtol=1e-5, atol=1e-5, msg=name)


def trained_in_bf16(directory: Path, ranks: Ranks) -> None:
    losses = []
    for spread in (
        lambda model: parallel.replicate(model, ranks),
        lambda model: parallel.shard(model, ranks, "bf16"),
    ):
        reports = Reports()
        trained = Learner(spread(llama()), ranks, FAST, precision="bf16")
        fit(trained, Rows(8, 2, ranks=ranks), next_token, PLAN, [reports])
        losses.append([one.sums["train/loss"] / one.weight for one in reports.seen])

    assert losses[1] == pytest.approx(losses[0], rel=5e-3)


def resumed(directory: Path, ranks: Ranks) -> None:
    for how in ("replicate", "shard"):

        def attempt(run: str, *extra: Hook, how: str = how) -> dict[str, torch.Tensor]:
            trained = learner(how, ranks)

            def save_model(path: Path) -> None:
                full = parallel.gather_weights(trained.model)
                if ranks.is_main:
                    torch.save(full, path / "model.pt")

            fit(
                trained,
                Rows(8, 2, ranks=ranks),
                next_token,
                PLAN,
                [hooks.Checkpoint(directory / how / run, save_model), *extra],
            )
            return trained.state_dict()["model"]

        whole = attempt("whole", Crash(-1))
        with pytest.raises(KeyboardInterrupt):
            attempt("broken", Crash(5))

        again = attempt("broken", Crash(-1))
        saved = torch.load(
            state.find_latest(directory / how / "broken") / "model.pt", weights_only=True
        )
        assert len(whole) == (len(saved) if ranks.is_main or how == "replicate" else 0)

        for name, value in whole.items():
            assert torch.equal(value, again[name]), name
            assert torch.equal(value, saved[name]), name


def stops(directory: Path, ranks: Ranks) -> None:
    class OneRank(Hook):
        def on_step(self, training, report):
            training.stop_requested = ranks.rank == 1 and report.step == 2

    with pytest.raises(Stopped) as stopped:  # a signal on one rank stops both, at the same step
        fit(
            learner("replicate", ranks),
            Rows(8, 2, ranks=ranks),
            next_token,
            PLAN,
            [OneRank(), hooks.Checkpoint(directory / "stop")],
        )

    assert stopped.value.step == 3

    reports = Reports()  # the shorter source ends training on both
    fit(
        learner("replicate", ranks),
        Rows(8, 2, steps=4 - ranks.rank, ranks=ranks),
        next_token,
        PLAN,
        [reports],
    )
    assert len(reports.seen) == 3

    def poisoned(model, batch):
        loss = next_token(model, batch)
        loss.total = loss.total * (float("nan") if ranks.rank == 1 else 1.0)
        loss.metrics = {"seen": loss.weight}

        return loss

    with pytest.raises(UserError, match="step 1: the loss is not finite"):
        fit(learner("replicate", ranks), Rows(8, 2, ranks=ranks), poisoned, PLAN)

    reports = Reports()  # a single row leaves rank 1 without a micro-batch
    fit(
        learner("replicate", ranks),
        Rows(1, 1, ranks=ranks),
        poisoned,
        Plan(max_steps=1, schedule="constant"),
        [reports],
    )
    assert reports.seen[0].sums["seen"] == reports.seen[0].weight > 0

    def full_disk(path: Path) -> None:
        if ranks.is_main:
            raise OSError(28, "No space left on device")

    # on both ranks, and nothing half-written stays
    with pytest.raises(OSError, match="No space left"):
        fit(
            learner("replicate", ranks),
            Rows(8, 2, ranks=ranks),
            next_token,
            PLAN,
            [hooks.Checkpoint(directory / "full", full_disk)],
        )

    ranks.barrier()
    assert list((directory / "full" / "checkpoints").iterdir()) == []


def resumed_and_stopped(directory: Path, ranks: Ranks) -> None:
    resumed(directory, ranks)
    stops(directory, ranks)


def test_two_ranks_train_like_one(tmp_path):
    model, reports = llama(), Reports()
    fit(Learner(model, ALONE, FAST, apart=APART), Rows(8, 2), next_token, PLAN, [reports])
    torch.save((weights(model), reports.seen), tmp_path / "alone.pt")
    together(trained_together, tmp_path)


def test_a_relative_with_tied_heads_is_trained_by_two_ranks_as_by_one(tmp_path):
    model = Llama(RELATIVE)
    alone = Learner(model, ALONE, FAST)
    members = [len(group["params"]) for group in alone.optimizer.param_groups]
    assert sum(members) == len(list(model.parameters())), "what is tied is there once"
    before = weights(model)
    fit(alone, Rows(8, 2), next_token, PLAN)
    assert all(bool((value != before[name]).any()) for name, value in model.named_parameters())
    torch.save(weights(model), tmp_path / "alone.pt")
    together(relative_trained_together, tmp_path)


def test_a_model_spread_over_ranks_trains_in_bf16_as_its_copies_do(tmp_path):
    together(trained_in_bf16, tmp_path)


def test_two_ranks_resume_bitwise_and_stop_together(tmp_path):
    together(resumed_and_stopped, tmp_path)
    with pytest.raises(UserError, match="taken by 2 ranks, this run has 1"):
        fit(
            Learner(llama(), ALONE, FAST),
            Rows(8, 2),
            next_token,
            PLAN,
            [hooks.Checkpoint(tmp_path / "replicate" / "whole"), Crash(-1)],
        )
