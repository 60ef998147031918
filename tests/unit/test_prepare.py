"""The prepare stage: split by opening turn, limits, weights, exclusions, duplicates, and the same
files every time."""

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
    rows = [
        {"prompt": f"Question {i // 2}", "chosen": f"good {i}", "rejected": f"bad {i}"}
        for i in range(count)
    ]
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
    for seed, (kind, record) in enumerate(
        {"preferences": Preference, "dialogs": Dialog, "prompts": Prompt}.items()
    ):
        out = carry_out(tmp_path / kind, kind=kind, sources=sources, heldout=0.3, seed=seed)
        train, heldout = (
            list(read(record, out / name)) for name in (f"{kind}.jsonl", f"heldout-{kind}.jsonl")
        )
        assert len(train) + len(heldout) == (200 if kind == "prompts" else 400)
        openings = [
            {prepare.normalize_opening(prepare._messages(r)) for r in side}
            for side in (train, heldout)
        ]
        assert not openings[0] & openings[1]
        assert 35 < len(openings[1]) < 85
        sides[kind] = openings

    assert sides["preferences"] == sides["dialogs"] == sides["prompts"]


def test_a_larger_held_out_share_contains_a_smaller_one_and_case_does_not_count():
    turns = [messages_of([("user", f"Question  {i}")]) for i in range(500)]
    small, large = ({t for t in turns if prepare.is_heldout(t, share)} for share in (0.1, 0.2))
    assert small < large
    assert all(
        prepare.is_heldout(messages_of([("user", t[0].content.upper())]), 0.1) for t in small
    )


def test_the_files_follow_from_seed_and_content_alone(tmp_path):
    values = {
        "kind": "preferences",
        "sources": {"mine": {"path": pairs(tmp_path / "p.jsonl", 100), "limit": 30}},
    }
    texts = [
        (carry_out(tmp_path / name, seed=seed, **values) / "preferences.jsonl").read_text()
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    assert texts[0] == texts[1] != texts[2]
    assert len(texts[0].splitlines()) == len(texts[2].splitlines()) == 30
    assert set(texts[0].splitlines()) != set(texts[2].splitlines())
    numbers = [
        int(json.loads(line)["prompt"][0]["content"].split()[1]) for line in texts[0].splitlines()
    ]
    assert numbers != sorted(numbers)


def test_weights_repeat_training_records_only(tmp_path):
    path = pairs(tmp_path / "p.jsonl", 400)
    out = carry_out(
        tmp_path / "out",
        kind="preferences",
        heldout=0.2,
        sources={"mine": {"path": path, "weight": 2.5}},
    )
    train = [r.id for r in read(Preference, out / "preferences.jsonl")]
    heldout = [r.id for r in read(Preference, out / "heldout-preferences.jsonl")]
    assert {train.count(one) for one in set(train)} == {2, 3}
    assert 2.3 < len(train) / len(set(train)) < 2.7
    assert len(heldout) == len(set(heldout))


@pytest.mark.parametrize("kind", ["dialogs", "preferences"])
def test_no_conversation_is_on_both_sides_whatever_weights_copies_and_depths(tmp_path, kind):
    deep = [
        {
            "chosen": f"\n\nHuman: Q{i}\n\nAssistant: a\n\nHuman: {said}\n\nAssistant: good {i}",
            "rejected": f"\n\nHuman: Q{i}\n\nAssistant: a\n\nHuman: {said}\n\nAssistant: bad {i}",
        }
        for i in range(60)
        for said in ("why?", "how?")
    ]
    flat = [
        {
            "chosen": f"\n\nHuman:  q{i} \n\nAssistant: so",
            "rejected": f"\n\nHuman:  q{i} \n\nAssistant: no",
        }
        for i in range(60)
    ]
    paths = {}

    for name, rows in {"deep": deep, "flat": flat + flat, "again": deep}.items():
        paths[name] = tmp_path / f"{name}.jsonl"
        paths[name].write_text("".join(json.dumps(row) + "\n" for row in rows))

    sources = {
        "deep": {"path": paths["deep"], "weight": 3},
        "flat": {"path": paths["flat"], "weight": 0.5},
        "again": {"path": paths["again"], "weight": 2},
    }

    out = carry_out(tmp_path / "out", kind=kind, sources=sources, heldout=0.3)
    record = Dialog if kind == "dialogs" else Preference
    train, heldout = (
        [prepare.normalize_opening(prepare._messages(r)) for r in read(record, out / name)]
        for name in (f"{kind}.jsonl", f"heldout-{kind}.jsonl")
    )
    assert 8 < len({*heldout}) < 30
    assert {*train} | {*heldout} >= {f"q{i}" for i in range(60) if f"q{i}" in heldout}
    assert not {*train} & {*heldout}
    assert len(heldout) == 3 * len({*heldout})  # two depths and one flat, each once
    assert train.count(train[0]) >= 6


def test_a_source_ends_with_one_line_and_the_summary_says_the_same(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    rows = [
        {"prompt": f"p{i}", "completion": "c" if i else "", "label": i != 1, "id": i, "source": "s"}
        for i in range(5)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = carry_out(tmp_path / "out", kind="dialogs", sources={"mine": {"path": path}})
    assert capsys.readouterr().err.splitlines() == [
        f"{out}: mine: read 5, kept 3, left out 2: empty answer 1, the answer is marked as bad 1; "
        "format: question-answer 5; columns not read: id 3, source 3"
    ]
    (source,) = json.loads((out / "summary.json").read_text())["sources"]
    assert source["skipped"] == {"empty answer": 1, "the answer is marked as bad": 1}
    assert source["format"] == {"question-answer": 5}
    assert source["columns_not_read"] == {"id": 3, "source": 3}


def test_the_line_of_comparisons_says_their_axis(tmp_path, capsys):
    carry_out(
        tmp_path / "out",
        kind="preferences",
        sources={"mine": {"path": pairs(tmp_path / "p.jsonl", 4)}},
    )
    assert "mine: read 4, kept 4; format: pairs 4; axis: helpful 4" in capsys.readouterr().err


def test_columns_can_be_left_out_by_name(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "p", "completion": "c", "rating": 3}\n')
    with pytest.raises(UserError, match=r"'rating' would be lost.*--sources.NAME.ignore rating"):
        carry_out(tmp_path / "a", kind="dialogs", sources={"mine": {"path": path}})

    out = carry_out(
        tmp_path / "b", kind="dialogs", sources={"mine": {"path": path, "ignore": ["rating"]}}
    )
    assert len(list(read(Dialog, out / "dialogs.jsonl"))) == 1


def test_a_file_whose_first_row_is_broken_is_still_known_for_what_it_holds(tmp_path):
    path = pairs(tmp_path / "p.jsonl", 6)
    path.write_text('{"foo": 1}\n{broken\n' + path.read_text())
    for kind in ("preferences", "dialogs", "prompts"):
        out = carry_out(
            tmp_path / kind, kind=kind, sources={"mine": {"path": path, "malformed": "skip"}}
        )
        (source,) = json.loads((out / "summary.json").read_text())["sources"]
        assert (source["read"], source["skipped"]["malformed"], source["format"]) == (
            8,
            2,
            {"pairs": 6},
        )


def test_duplicates_long_and_excluded_records_are_counted(tmp_path):
    path = tmp_path / "d.jsonl"
    rows = [
        ("Hi", "Hello"),
        ("Hi", "Hello"),
        ("Long", "x" * 200),
        ("First  QUESTION?", "An answer"),
        ("Bye", "Ciao"),
    ]
    path.write_text("".join(json.dumps({"instruction": i, "output": o}) + "\n" for i, o in rows))
    out = carry_out(
        tmp_path / "out",
        kind="dialogs",
        max_characters=100,
        exclude=[FIXTURES / "lines.txt"],
        sources={"mine": {"path": path}, "again": {"path": path}},
    )
    assert sorted(d.messages[0].content for d in read(Dialog, out / "dialogs.jsonl")) == [
        "Bye",
        "Hi",
    ]
    mine, again = json.loads((out / "summary.json").read_text())["sources"]
    assert mine["skipped"] == {"duplicate": 1, "too long": 1, "excluded": 1}
    assert (mine["read"], mine["kept"], again["kept"], again["skipped"]["duplicate"]) == (
        5,
        2,
        0,
        3,
    )
    assert not (out / "heldout-dialogs.jsonl").exists()


def test_answers_with_a_phrase_are_left_out(tmp_path):
    path = tmp_path / "d.jsonl"
    rows = [("A?", "As an AI, no."), ("As an AI?", "Yes."), ("B?", "Well, as an Airman: yes.")]
    path.write_text("".join(json.dumps({"instruction": i, "output": o}) + "\n" for i, o in rows))
    source = {"path": path, "without": ["as an ai,", "never said"]}
    out = carry_out(tmp_path / "out", kind="dialogs", sources={"mine": source})
    kept = {dialog.messages[0].content for dialog in read(Dialog, out / "dialogs.jsonl")}
    assert kept == {"As an AI?", "B?"}
    (mine,) = json.loads((out / "summary.json").read_text())["sources"]
    assert mine["skipped"] == {"with a phrase of `without`": 1}

    # of a comparison both answers count
    pair = {"prompt": "A?", "chosen": "Yes.", "rejected": "I AM SORRY"}
    path.write_text(json.dumps(pair) + "\n" + json.dumps({**pair, "rejected": "No"}) + "\n")
    source = {"path": path, "without": ["I am sorry"]}
    out = carry_out(tmp_path / "pairs", kind="preferences", sources={"mine": source})
    assert len(list(read(Preference, out / "preferences.jsonl"))) == 1


def test_comparisons_serve_as_dialogs_and_prompts(tmp_path):
    (tmp_path / "harmless").mkdir()
    path = tmp_path / "harmless" / "pairs.jsonl"
    path.write_text((FIXTURES / "hh.jsonl").read_text())
    dialogs = carry_out(tmp_path / "d", kind="dialogs", sources={"hh": {"path": path}})
    prompts = carry_out(
        tmp_path / "p", kind="prompts", sources={"hh": {"path": path, "family": "unsafe"}}
    )
    dialog, prompt = (
        next(read(Dialog, dialogs / "dialogs.jsonl")),
        next(read(Prompt, prompts / "prompts.jsonl")),
    )
    assert dialog.messages[-1].content == "The nightingale."
    assert prompt.messages == dialog.messages[:-1]
    assert prompt.safety
    assert prompt.metadata == {"source": "hh", "family": "unsafe"}


def test_what_is_held_out_of_comparisons_can_be_kept_out_of_dialogs(tmp_path):
    sources = {"mine": {"path": pairs(tmp_path / "p.jsonl", 200)}}
    compared = carry_out(tmp_path / "p", kind="preferences", sources=sources, heldout=0.3)
    heldout = compared / "heldout-preferences.jsonl"
    dialogs = carry_out(tmp_path / "d", kind="dialogs", sources=sources, exclude=[heldout])
    assert {r.messages[:-1] for r in read(Dialog, dialogs / "dialogs.jsonl")} == {
        r.prompt for r in read(Preference, compared / "preferences.jsonl")
    }


@pytest.mark.parametrize(
    ("values", "cause"),
    [
        ({"sources": {}}, "there is nothing to prepare"),
        (
            {"sources": {"x": {"path": FIXTURES / "hh.jsonl"}}, "heldout": 0.0001},
            "no record is held out",
        ),
        (
            {"sources": {"x": {"path": FIXTURES / "hh.jsonl"}}, "max_characters": 3},
            "no record is left to train on",
        ),
        (
            {"sources": {"x": {"path": FIXTURES / "hh.jsonl", "axes": "safe"}}},
            "unknown key 'sources.x.axes'",
        ),
    ],
)
def test_a_preparation_that_makes_nothing_says_why(tmp_path, values, cause):
    with pytest.raises(UserError, match=cause):
        carry_out(tmp_path / "out", kind="preferences", **values)
