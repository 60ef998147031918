"""How ranks find their device and one another, and which share each of them has."""

from __future__ import annotations

import pytest
import torch

from llama2 import devices, ranks
from llama2.errors import UserError
from llama2.ranks import Axis, Ranks


def test_a_process_alone_has_everything() -> None:
    alone = Ranks.alone()
    assert (alone.rank, alone.size, alone.is_main) == (0, 1, True)
    assert {alone.replicate, alone.shard, alone.context, alone.tensor} == {Axis()}
    assert alone.share([1, 2, 3]) == alone.unshare([1, 2, 3]) == alone.gather([1, 2, 3])
    assert alone.broadcast("x") == alone.first(lambda: "x") == "x"
    assert alone.all_sum(torch.ones(2)).tolist() == [1, 1]


def test_shares_follow_the_axis_of_data_whatever_it_is_called() -> None:
    """Ranks of another axis read the same rows."""
    group = object()
    copies = Ranks(torch.device("cpu"), 3, 4, replicate=Axis(4, 3, group))  # type: ignore[arg-type]
    spread = copies.spread()
    assert (spread.shard, spread.replicate) == (copies.replicate, Axis())
    assert copies.share(range(9)) == spread.share(range(9)) == range(3, 9, 4)

    split = Ranks(
        torch.device("cpu"),
        3,
        4,
        replicate=Axis(2, 1, group),  # type: ignore[arg-type]
        tensor=Axis(2, 1, group),  # type: ignore[arg-type]
    )
    assert split.share(range(9)) == range(1, 9, 2)


def test_an_error_that_rank_0_alone_may_meet_keeps_its_text() -> None:
    def fail() -> None:
        raise UserError("cause", "cure")

    with pytest.raises(UserError, match="cause; cure"):
        Ranks.alone().first(fail)


def test_more_ranks_than_gpus_are_refused(monkeypatch) -> None:
    monkeypatch.setattr(devices, "choose", lambda: torch.device("cuda", 1))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("WORLD_SIZE", "2")

    with pytest.raises(UserError, match="this machine has 1 GPUs, and rank 1"):
        ranks.join()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"WORLD_SIZE": "two"},
            "WORLD_SIZE=two: the number of ranks is wanted; unset it, or start with torchrun",
        ),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0: the number of ranks is wanted"),
        (
            {"WORLD_SIZE": "2", "RANK": "0"},
            "WORLD_SIZE=2, but MASTER_ADDR and MASTER_PORT is not set; start",
        ),
        ({"LLAMA2_DEVICE": "gpu"}, "LLAMA2_DEVICE=gpu: it may be cpu and nothing else; unset it"),
    ],
)
def test_an_environment_that_cannot_be_meant_is_one_line(
    tmp_path, monkeypatch, one_line, given, message
) -> None:
    for name, value in given.items():
        monkeypatch.setenv(name, value)

    assert one_line("world", "--out", tmp_path / "w", "--scale", "0.001").startswith(message)
    assert not (tmp_path / "w").exists()


def test_a_dry_run_reckons_with_the_ranks_of_the_environment(monkeypatch, one_line) -> None:
    monkeypatch.setenv("WORLD_SIZE", "x")
    assert one_line("world", "--out", "w", "--dry-run").startswith(
        "WORLD_SIZE=x: the number of ranks is wanted"
    )
