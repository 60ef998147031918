"""Work in parts: finished ones are kept, a damaged end is made again, and the rows are the same in
the end."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from llama2.runs import CHECKPOINTS, Run
from llama2.runs.parts import work_in_parts

ITEMS = list(range(10))


def doubled(calls: list[int], fail_at: int | None = None) -> Any:
    def work(some: Sequence[int], first: int) -> list[Any]:
        if first == fail_at:
            raise RuntimeError("killed")

        calls.append(first)
        return [{"item": item, "text": "\ud83d" * item} for item in some]

    return work


def test_rows_come_in_order_whatever_the_size(tmp_path: Path) -> None:
    for size in (1, 3, 10, 99):
        rows = [
            row["item"]
            for row in work_in_parts(
                Run(tmp_path / str(size), False), "x", ITEMS, size, doubled([])
            )
        ]
        assert rows == ITEMS


def test_finished_parts_are_not_made_again(tmp_path: Path) -> None:
    calls: list[int] = []
    with pytest.raises(RuntimeError):
        list(work_in_parts(Run(tmp_path, False), "x", ITEMS, 3, doubled(calls, fail_at=6)))

    assert calls == [0, 3]
    again: list[int] = []
    rows = list(work_in_parts(Run(tmp_path, False), "x", ITEMS, 3, doubled(again)))
    assert again == [6, 9]
    assert rows == list(work_in_parts(Run(tmp_path / "other", False), "x", ITEMS, 3, doubled([])))


@pytest.mark.parametrize(
    "damage", [b'{"part":', b'{"first":5,"items":5,"sum":5,"rows":"[1]"}\n', b"\xff\xfe\n"]
)
def test_a_damaged_end_is_made_again(
    tmp_path: Path, damage: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    list(work_in_parts(Run(tmp_path, False), "x", ITEMS, 5, doubled([])))
    file = tmp_path / CHECKPOINTS / "parts" / "x.jsonl"
    first = file.read_bytes().split(b"\n")[0] + b"\n"
    file.write_bytes(first + damage)
    calls: list[int] = []
    rows = [
        row["item"] for row in work_in_parts(Run(tmp_path, False), "x", ITEMS, 5, doubled(calls))
    ]
    assert calls == [5]
    assert rows == ITEMS
    said = (
        f"{file}: damaged behind the first 5 of 10; the rest is made again\n"
        if damage.endswith(b"\n")
        else ""
    )
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("key", ["first", "items", "sum", "rows"])
def test_each_value_of_a_line_is_vouched_for(tmp_path: Path, key: str) -> None:
    list(work_in_parts(Run(tmp_path, False), "x", ITEMS, 5, doubled([])))
    file = tmp_path / CHECKPOINTS / "parts" / "x.jsonl"
    first, second, _ = file.read_text().split("\n")
    changed = {"first": 4, "items": 4, "sum": 1, "rows": "[1]"}
    file.write_text(f"{first}\n{json.dumps({**json.loads(second), key: changed[key]})}\n")
    calls: list[int] = []
    assert [
        row["item"] for row in work_in_parts(Run(tmp_path, False), "x", ITEMS, 5, doubled(calls))
    ] == ITEMS
    assert calls == [5]


def test_nothing_to_do(tmp_path: Path) -> None:
    assert list(work_in_parts(Run(tmp_path, False), "x", [], 5, doubled([]))) == []


def test_work_goes_on_in_parts_of_another_size(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        list(work_in_parts(Run(tmp_path, False), "x", ITEMS, 3, doubled([], fail_at=6)))

    calls: list[int] = []
    rows = list(work_in_parts(Run(tmp_path, False), "x", ITEMS, 2, doubled(calls)))
    assert calls == [6, 8]
    assert rows == list(work_in_parts(Run(tmp_path / "other", False), "x", ITEMS, 3, doubled([])))
