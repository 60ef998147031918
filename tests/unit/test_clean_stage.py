"""The stage that cleans: what it writes and counts, in bounded memory, whole or not at all."""

import json
import tracemalloc

import pytest
from commands import llama2

from llama2 import records
from llama2.errors import UserError
from llama2.records import Document
from llama2.runs import Run
from llama2.stages.clean import Config, run


def clean(tmp_path, sources, **more):
    out = tmp_path / "out"
    run(Config(out=out, sources=sources, **more), found := Run(out, finished=False))
    return found, json.loads((out / "summary.json").read_text())["sources"]


def text(number):
    return f"Number {number} is a document about the {number * 7919}th stone of the wall. " * 20


def test_sources_are_split_deduplicated_and_counted(tmp_path):
    rows = [{"text": text(number)} for number in range(50)] + [{"text": text(3)}, {"text": "short"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "b.jsonl").write_text(
        json.dumps({"text": text(4)}) + "\n" + json.dumps({"text": text(99)}) + "\n"
    )
    found, summary = clean(
        tmp_path,
        {"a": {"path": tmp_path / "a.jsonl"}, "b": {"path": tmp_path / "b.jsonl"}},
        heldout=0.3,
    )
    kept, aside = (
        list(records.read(Document, tmp_path / f"out/{folder}/a.jsonl"))
        for folder in ("documents", "heldout")
    )
    assert len(kept) + len(aside) == summary["a"]["kept"] == 50
    assert 5 < len(aside) == summary["a"]["heldout"] < 25
    assert summary["a"]["bytes"] == sum(len(one.text.encode()) for one in kept + aside)
    assert found.tallies["a"].line() == "read 52, kept 50, left out 2: too short 1, duplicate 1"
    assert found.tallies["b"].line() == "read 2, kept 1, left out 1: duplicate 1"


def test_memory_holds_no_source(tmp_path):
    with records.open_writer(tmp_path / "a.jsonl") as put:
        for number in range(8000):
            put(Document(text(number)))

    size = (tmp_path / "a.jsonl").stat().st_size
    tracemalloc.start()
    clean(tmp_path, {"a": {"path": tmp_path / "a.jsonl"}})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size > 8e6
    assert peak < 0.3 * size


def test_a_source_that_breaks_off_leaves_no_file_under_its_name(tmp_path, one_line):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text(1)}) + '\n{"text": \n')
    heard = one_line("clean", "--sources.web.path", tmp_path / "a.jsonl", "--out", tmp_path / "out")
    assert heard.startswith(f"{tmp_path}/a.jsonl:2: not valid JSON")
    assert not (tmp_path / "out/documents/web.jsonl").exists()


def test_malformed_rows_are_skipped_where_that_is_asked_for(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text(
        '{"text": \n' + json.dumps({"text": text(1)}) + '\n{"text": "\\ud800"}\n'
    )
    assert (
        llama2(
            "clean",
            "--sources.web.path",
            tmp_path / "a.jsonl",
            "--sources.web.malformed",
            "skip",
            "--out",
            tmp_path / "out",
        )
        == 0
    )
    assert "web: read 3, kept 1, left out 2: malformed 2" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["clean", "tokenizer"])
def test_globs_and_folders_are_read_and_what_is_left_out_is_said(tmp_path, capsys, verb):
    (tmp_path / "data").mkdir()
    for number in (1, 2):
        (tmp_path / f"data/{number}.txt").write_text(text(number))

    (tmp_path / "data/README.txt").write_text("What this is.")
    (tmp_path / "data/.hidden.txt").write_text("hidden")
    key = {"clean": ("--sources.web.path",), "tokenizer": ("--vocab-size", 300, "--documents")}[
        verb
    ]

    for place, said in (("data/*.txt", "README.txt 1"), ("data", "hidden 1, README.txt 1")):
        assert llama2(verb, *key, tmp_path / place, "--out", tmp_path / f"{place[-1]}-out") == 0
        heard = capsys.readouterr().err
        assert "read 2, kept 2; files left out" in heard
        assert heard.strip().endswith(said)


def test_a_source_is_named_like_a_file(tmp_path, one_line):
    (tmp_path / "a.txt").write_text(text(1))
    assert "without '/'" in one_line(
        "clean", "--sources.web/x.path", tmp_path / "a.txt", "--out", tmp_path / "out"
    )
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_read_is_named_with_the_way_out(tmp_path):
    (tmp_path / "a.txt").write_bytes(text(1).encode() + b"\xff")
    with pytest.raises(
        UserError,
        match=r"a.txt:1: not UTF-8.*or leave out what cannot be read with malformed: skip",
    ):
        clean(tmp_path, {"a": {"path": tmp_path / "a.txt"}})
