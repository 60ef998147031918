"""Tokenizing that was interrupted: what is whole is kept, what is damaged is written again."""

import os
import shutil

import pytest
from commands import llama2

from llama2 import records
from llama2.records import Document

NAMES = ("a", "b")


@pytest.fixture
def words(tmp_path, tokenizer):
    """A command, and a finished run of it that is unfinished again."""
    for split in ("documents", "heldout"):
        for name in NAMES:
            records.write(
                tmp_path / f"clean/{split}/{name}.jsonl",
                [Document(f"{split} {name} {i}") for i in range(9)],
            )

    tokenizer.save(tmp_path / "tokenizer")
    words = ("tokenize", "--documents", tmp_path / "clean", "--tokenizer", tmp_path / "tokenizer")
    assert llama2(*words, "--out", tmp_path / "whole") == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    (tmp_path / "run/COMPLETE").unlink()

    return (*words, "--out", tmp_path / "run")


def halve(path):
    os.truncate(path, path.stat().st_size // 2)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("name", ["index.json", "tokens-00000.bin", "documents-00000.bin"])
@pytest.mark.parametrize("damage", [empty, halve, flip])
def test_damaged_shards_of_an_attempt_before_are_written_again(
    tmp_path, words, damage, name, capsys
):
    damage(tmp_path / "run/train/a" / name)
    kept = (tmp_path / "run/train/b/index.json").stat()
    capsys.readouterr()
    assert llama2(*words) == 0
    said = capsys.readouterr().err
    assert str(tmp_path / "run/train/a") in said
    assert "; written again\n" in said
    assert (tmp_path / "run/train/b/index.json").stat().st_mtime_ns == kept.st_mtime_ns

    for path in (tmp_path / "whole/train").rglob("*.*"):
        assert (
            tmp_path / "run/train" / path.relative_to(tmp_path / "whole/train")
        ).read_bytes() == path.read_bytes()


def test_shards_that_no_run_vouches_for_are_read_before_training(tmp_path, words, one_line):
    shards = tmp_path / "mine"
    shutil.copytree(tmp_path / "run", shards, ignore=shutil.ignore_patterns("manifest.json"))
    flip(shards / "train/a/tokens-00000.bin")
    refusal = one_line(
        "pretrain",
        "--shards",
        shards,
        "--size",
        "tiny",
        "--sequence-length",
        8,
        "--batch-size",
        1,
        "--out",
        tmp_path / "model",
    )
    assert refusal == (
        f"{shards / 'train/a/tokens-00000.bin'}: its checksum differs from the index; copy or tokenize "
        "it again"
    )
