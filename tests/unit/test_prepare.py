"""The prepare stage: split by opening turn, limits, weights, exclusions, duplicates, and the same files every time."""

import json
from pathlib import Path

import pytest

from llama2.config import build
from llama2.errors import UserError
from llama2.records import Dialog, Preference, Prompt, messages_of, read
from llama2.runs import open_run
from llama2.stages import prepare

FIXTURES = Path(__file__).parent.parent / "fixtures" / "import"


def pairs(path: Path, count: int) -> Path:
    rows = [{"prompt": f"Question {i // 2}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def carry_out(out: Path, **values: object) -> Path:
    config = build(prepare.Config, {"out": out, **values})
    with open_run("prepare", config) as run:
        prepare.run(config, run)
    return out


def test_the_same_opening_is_on_the_same_side_in_every_kind(tmp_path):
    sources = {"mine": {"path": pairs(tmp_path / "p.jsonl", 400)}}
    sides = {}
    for seed, (kind, record) in enumerate({"preferences": Preference, "dialogs": Dialog, "prompts": Prompt}.items()):
        out = carry_out(tmp_path / kind, kind=kind, sources=sources, heldout=0.3, seed=seed)
        train, heldout = (list(read(record, out / name)) for name in (f"{kind}.jsonl", f"heldout-{kind}.jsonl"))
        assert len(train) + len(heldout) == (200 if kind == "prompts" else 400)
        openings = [{prepare.opening(prepare._messages(r)) for r in side} for side in (train, heldout)]
        assert not openings[0] & openings[1]
        assert 35 < len(openings[1]) < 85
        sides[kind] = openings
    assert sides["preferences"] == sides["dialogs"] == sides["prompts"]


def test_a_larger_held_out_share_contains_a_smaller_one_and_case_does_not_count():
    turns = [messages_of([("user", f"Question  {i}")]) for i in range(500)]
    small, large = ({t for t in turns if prepare.is_heldout(t, share)} for share in (0.1, 0.2))
    assert small < large
    assert all(prepare.is_heldout(messages_of([("user", t[0].content.upper())]), 0.1) for t in small)


def test_the_files_follow_from_seed_and_content_alone(tmp_path):
    values = {"kind": "preferences", "sources": {"mine": {"path": pairs(tmp_path / "p.jsonl", 100), "limit": 30}}}
    texts = [(carry_out(tmp_path / name, seed=seed, **values) / "preferences.jsonl").read_text()
             for name, seed in (("a", 1), ("b", 1), ("c", 2))]
    assert texts[0] == texts[1] != texts[2]
    assert len(texts[0].splitlines()) == len(texts[2].splitlines()) == 30
    assert set(texts[0].splitlines()) != set(texts[2].splitlines())
    numbers = [int(json.loads(line)["prompt"][0]["content"].split()[1]) for line in texts[0].splitlines()]
    assert numbers != sorted(numbers)


def test_weights_repeat_training_records_only(tmp_path):
    path = pairs(tmp_path / "p.jsonl", 400)
    out = carry_out(tmp_path / "out", kind="preferences", heldout=0.2, sources={"mine": {"path": path, "weight": 2.5}})
    train = [r.id for r in read(Preference, out / "preferences.jsonl")]
    heldout = [r.id for r in read(Preference, out / "heldout-preferences.jsonl")]
    assert {train.count(one) for one in set(train)} == {2, 3}
    assert 2.3 < len(train) / len(set(train)) < 2.7
    assert len(heldout) == len(set(heldout))


def test_duplicates_long_and_excluded_records_are_counted(tmp_path):
    path = tmp_path / "d.jsonl"
    rows = [("Hi", "Hello"), ("Hi", "Hello"), ("Long", "x" * 200), ("First  QUESTION?", "An answer"), ("Bye", "Ciao")]
    path.write_text("".join(json.dumps({"instruction": i, "output": o}) + "\n" for i, o in rows))
    out = carry_out(tmp_path / "out", kind="dialogs", max_characters=100, exclude=[FIXTURES / "lines.txt"],
                    sources={"mine": {"path": path}, "again": {"path": path}})
    assert sorted(d.messages[0].content for d in read(Dialog, out / "dialogs.jsonl")) == ["Bye", "Hi"]
    mine, again = json.loads((out / "summary.json").read_text())["sources"]
    assert mine["skipped"] == {"duplicate": 1, "too long": 1, "excluded": 1}
    assert (mine["read"], mine["kept"], again["kept"], again["skipped"]["duplicate"]) == (5, 2, 0, 3)
    assert not (out / "heldout-dialogs.jsonl").exists()


def test_comparisons_serve_as_dialogs_and_prompts(tmp_path):
    (tmp_path / "harmless").mkdir()
    path = tmp_path / "harmless" / "pairs.jsonl"
    path.write_text((FIXTURES / "hh.jsonl").read_text())
    dialogs = carry_out(tmp_path / "d", kind="dialogs", sources={"hh": {"path": path}})
    prompts = carry_out(tmp_path / "p", kind="prompts", sources={"hh": {"path": path, "family": "unsafe"}})
    dialog, prompt = next(read(Dialog, dialogs / "dialogs.jsonl")), next(read(Prompt, prompts / "prompts.jsonl"))
    assert dialog.messages[-1].content == "The nightingale."
    assert prompt.messages == dialog.messages[:-1]
    assert prompt.safety
    assert prompt.metadata == {"source": "hh", "family": "unsafe"}


def test_what_is_held_out_of_comparisons_can_be_kept_out_of_dialogs(tmp_path):
    sources = {"mine": {"path": pairs(tmp_path / "p.jsonl", 200)}}
    compared = carry_out(tmp_path / "p", kind="preferences", sources=sources, heldout=0.3)
    heldout = compared / "heldout-preferences.jsonl"
    dialogs = carry_out(tmp_path / "d", kind="dialogs", sources=sources, exclude=[heldout])
    assert ({r.messages[:-1] for r in read(Dialog, dialogs / "dialogs.jsonl")}
            == {r.prompt for r in read(Preference, compared / "preferences.jsonl")})


@pytest.mark.parametrize(("values", "cause"), [
    ({"sources": {}}, "there is nothing to prepare"),
    ({"sources": {"x": {"path": FIXTURES / "hh.jsonl"}}, "heldout": 0.0001}, "no record is held out"),
    ({"sources": {"x": {"path": FIXTURES / "hh.jsonl"}}, "max_characters": 3}, "no record is left to train on"),
    ({"sources": {"x": {"path": FIXTURES / "hh.jsonl", "axes": "safe"}}}, "unknown key 'sources.x.axes'"),
])
def test_a_preparation_that_makes_nothing_says_why(tmp_path, values, cause):
    with pytest.raises(UserError, match=cause):
        carry_out(tmp_path / "out", kind="preferences", **values)
