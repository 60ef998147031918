"""`llama2 export`: every format is written, verified and named; what does not fit is refused before
anything exists."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import llama2
from sources import state

from llama2.convert import export
from llama2.formats import checkpoint, meta
from llama2.formats.detect import open_model
from llama2.formats.stored_model import StoredModel
from llama2.tokenizer import Tokenizer, sentencepiece_model


@pytest.mark.parametrize(
    ("options", "name", "verified"),
    [
        (["hf"], ".", "every number"),
        (["hf", "--dtype", "bf16"], ".", "rounded to bf16"),
        (["hf", "--dtype", "fp16"], ".", "rounded to fp16"),
        (["hf", "--dtype", "fp32"], ".", "every number"),
        (["meta"], ".", "every number"),
        (["gguf"], "base-f32.gguf", "every number"),
        (["gguf", "--type", "f16"], "base-f16.gguf", "rounded to fp16"),
        (["gguf", "--type", "bf16"], "base-bf16.gguf", "rounded to bf16"),
        (["gguf", "--type", "q8_0"], "base-q8_0.gguf", "rounded to q8_0"),
        (["gguf", "--type", "q4_0"], "base-q4_0.gguf", "rounded to q4_0"),
        (["llama2c"], "model.bin", "every number"),
        (["llama2c", "--type", "q8_0"], "model.bin", "rounded to q8_0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_every_format_is_written_and_verified(
    tmp_path: Path,
    base: Path,
    options: list[str],
    name: str,
    verified: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert llama2("export", base, "--to", *options, "--out", tmp_path / "out") == 0
    heard = capsys.readouterr()
    assert heard.out.strip() == str(tmp_path / "out" / name)
    assert verified in heard.err.splitlines()[-1]
    written = open_model(tmp_path / "out" / name)
    assert written.tokenizer is not None
    exact = verified == "every number"
    assert llama2("verify", base, written.path, "--length", 20) == (0 if exact else 1)

    if exact:
        original = state(open_model(base))
        assert all(torch.equal(tensor, original[key]) for key, tensor in state(written).items())

    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.fixture
def frugal(tmp_path: Path, base: Path) -> Path:
    """The model with a tokenizer that drops extra spaces, as SentencePiece's do unless told
    otherwise."""
    shutil.copytree(base, tmp_path / "frugal")
    (tmp_path / "frugal" / "checksums.json").unlink()
    file = tmp_path / "frugal" / "tokenizer.model"
    file.write_bytes(
        sentencepiece_model.build(
            replace(sentencepiece_model.load(file), extra_spaces_removed=True)
        )
    )
    assert Tokenizer.load(file).encode("a  b ") == Tokenizer.load(file).encode("a b")

    return tmp_path / "frugal"


def test_a_format_is_held_only_to_what_it_can_say_of_a_tokenizer(
    tmp_path: Path, frugal: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for kind, name in (
        ("llama2c", "model.bin"),
        ("gguf", "frugal-f32.gguf"),
        ("meta", "."),
        ("hf", "."),
    ):
        assert llama2("export", frugal, "--to", kind, "--out", tmp_path / kind) == 0
        heard = capsys.readouterr().err
        told = (
            "note: the tokenizer drops spaces at the ends of a text and all but one inside" in heard
        )
        assert told == (kind != "meta")  # tokenizer.json holds it no more than GGUF
        assert "holds every number of the original" in heard.splitlines()[-1]
        assert llama2("verify", frugal, tmp_path / kind / name, "--length", 8) == 0
        heard = capsys.readouterr().out
        assert (
            "dropped by one of the tokenizers, which one of the formats does not hold" in heard
        ) == (kind == "llama2c")


def test_another_vocabulary_is_no_matter_of_the_format(
    tmp_path: Path,
    frugal: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def swapped(target: Path) -> None:
        content = (target.parent / "tokenizer.bin").read_bytes()
        assert content.count(b"\x01\x00\x00\x00e") == 1
        (target.parent / "tokenizer.bin").write_bytes(
            content.replace(b"\x01\x00\x00\x00e", b"\x01\x00\x00\x00~")
        )

    monkeypatch.setattr(export.llama2c, "write", damaged_after(export.llama2c.write, swapped))
    assert llama2("export", frugal, "--to", "llama2c", "--out", tmp_path / "out") == 1
    assert "tokenizers differ: item" in capsys.readouterr().err.splitlines()[-1]


def test_constants_are_compared_as_numbers_of_the_format(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """1e-5 in fp32, as some conversions write it, and a base with more digits than fp32 has."""
    for name, theta, formats in (
        ("a", 10000.0, ("llama2c", "gguf")),
        ("b", 12345.678912345, ("gguf",)),
    ):
        shape = replace(
            checkpoint.config_of(base), rms_norm_eps=9.999999747378752e-06, rope_theta=theta
        )
        checkpoint.save(checkpoint.Llama(shape), tmp_path / name)
        Tokenizer.load(base).save(tmp_path / name)

        for kind in formats:
            assert (
                llama2(
                    "export", tmp_path / name, "--to", kind, "--out", tmp_path / f"{name}-{kind}"
                )
                == 0
            )

    assert llama2("export", tmp_path / "b", "--to", "llama2c", "--out", tmp_path / "c") == 2
    assert "rope_theta is 12345.678912345" in capsys.readouterr().err.splitlines()[-1]
    assert llama2("verify", tmp_path / "a", tmp_path / "b", "--length", 8) == 1


def test_a_disk_that_is_too_small_is_said_before_anything_is_written(
    tmp_path: Path, base: Path, one_line: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 9, 9)
    )
    for kind in ("hf", "meta", "gguf", "llama2c"):
        assert (
            "the weights take 0.0 GB, and 0.0 GB are free; free some space, choose another --out, or a smaller"
            in (one_line("export", base, "--to", kind, "--out", tmp_path / "out"))
        )

    assert list(tmp_path.iterdir()) == []


def test_meta_is_cut_for_ranks(tmp_path: Path, base: Path) -> None:
    shape = replace(checkpoint.config_of(base), num_key_value_heads=2)
    checkpoint.save(checkpoint.Llama(shape), tmp_path / "model")
    assert (
        llama2(
            "export", tmp_path / "model", "--to", "meta", "--shards", 2, "--out", tmp_path / "out"
        )
        == 0
    )
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "consolidated.00.pth",
        "consolidated.01.pth",
        "params.json",
    ]  # there was no tokenizer


def test_hugging_face_has_all_files_that_its_readers_look_for(tmp_path: Path, base: Path) -> None:
    assert llama2("export", base, "--to", "hf", "--dtype", "bf16", "--out", tmp_path / "out") == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json",
        "model.safetensors",
        "checksums.json",
        "tokenizer.model",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "special_tokens_map.json",
    }
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["torch_dtype"] == config["dtype"] == "bfloat16"
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["legacy"] is True
    assert Tokenizer.load(tmp_path / "out").fingerprint == Tokenizer.load(base).fingerprint


def test_reward_models_go_to_hugging_face_alone(
    tmp_path: Path,
    scorers: tuple[Path, Path],
    one_line: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert llama2("export", scorers[0], "--to", "hf", "--out", tmp_path / "out") == 0
    assert "scores" in capsys.readouterr().err
    for kind in ("meta", "gguf", "llama2c"):
        assert "reward model" in one_line(
            "export", scorers[0], "--to", kind, "--out", tmp_path / kind
        )
        assert not (tmp_path / kind).exists() or not any((tmp_path / kind).iterdir())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--to", "gguf", "--dtype", "bf16"], "--dtype does not go with --to gguf; give --type"),
        (["--to", "hf", "--type", "f16"], "--type does not go with --to hf; give --dtype"),
        (["--to", "hf", "--shards", 2], "--shards does not go with --to hf"),
        (["--to", "llama2c", "--type", "q4_0"], "llama2.c has no q4_0"),
        (["--to", "meta", "--shards", 2], "num_key_value_heads 1 does not divide into 2 shards"),
        (["--to", "onnx"], "'--to'"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else None,
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, base: Path, one_line: Callable[..., str], options: list[Any], words: str
) -> None:
    assert words in one_line("export", base, *options, "--out", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["hf", "meta", "gguf", "llama2c"])
def test_what_is_there_is_not_touched(
    tmp_path: Path, base: Path, one_line: Callable[..., str], kind: str
) -> None:
    target = tmp_path / {"gguf": "model.gguf", "llama2c": "model.bin"}.get(kind, "out")
    if kind in ("hf", "meta"):
        target.mkdir()
        mine = target / "mine"
    else:
        mine = target

    mine.write_text("kept")
    assert "something is there already" in one_line("export", base, "--to", kind, "--out", target)
    assert mine.read_text() == "kept"


def damaged_after(write: Callable[..., Any], damage: Callable[[Path], None]) -> Callable[..., Any]:
    def then(source: StoredModel, target: Path, **options: Any) -> Any:
        found = write(source, target, **options)
        damage(target)
        return found

    return then


def test_a_wrong_number_in_what_was_written_is_found(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A writer that makes a mistake: the files are sound, but hold another model."""

    def transposed(source: StoredModel, target: Path, **options: Any) -> list[str]:
        name = "model.layers.1.self_attn.o_proj.weight"
        stored = source.tensors[name]
        wrong = replace(stored, read=lambda: stored.read().t().contiguous())

        return original(replace(source, tensors={**source.tensors, name: wrong}), target, **options)

    original = meta.write
    monkeypatch.setattr(export.meta, "write", transposed)
    assert llama2("export", base, "--to", "meta", "--out", tmp_path / "out") == 1
    heard = capsys.readouterr()
    assert heard.out == ""
    assert "layers.1.self_attn.o_proj.weight" in heard.err.splitlines()[-1]
    assert "done" not in heard.err
    assert (tmp_path / "out" / "consolidated.00.pth").exists()


def test_rounding_is_no_excuse_for_another_model(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = export.hf.write

    def wrong(source: StoredModel, target: Path, **options: Any) -> None:
        name = "model.layers.0.mlp.up_proj.weight"
        stored = source.tensors[name]
        larger = replace(stored, read=lambda: stored.read() * 1.05)
        original(replace(source, tensors={**source.tensors, name: larger}), target, **options)

    monkeypatch.setattr(export.hf, "write", wrong)
    assert llama2("export", base, "--to", "hf", "--dtype", "bf16", "--out", tmp_path / "out") == 1
    assert "layers.0.mlp.up_proj.weight differs by 0.05" in capsys.readouterr().err.splitlines()[-1]


def test_what_the_disk_damaged_is_found(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def damage(target: Path) -> None:
        path = target / "consolidated.00.pth"
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 255
        path.write_bytes(content)

    monkeypatch.setattr(export.meta, "write", damaged_after(meta.write, damage))
    assert llama2("export", base, "--to", "meta", "--out", tmp_path / "out") == 1
    assert "consolidated.00.pth" in capsys.readouterr().err.splitlines()[-1]


def test_a_damaged_source_leaves_no_target(
    tmp_path: Path, base: Path, one_line: Callable[..., str]
) -> None:
    shutil.copytree(base, tmp_path / "model")
    (tmp_path / "model" / "checksums.json").unlink()
    path = tmp_path / "model" / "model.safetensors"
    os.truncate(path, path.stat().st_size - 100)
    assert "model.safetensors" in one_line(
        "export", tmp_path / "model", "--to", "meta", "--out", tmp_path / "out"
    )
    assert sorted(found.name for found in tmp_path.iterdir()) == ["model"]


def test_more_ends_than_a_format_can_name_are_noted(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = replace(checkpoint.config_of(base), eos_token_id=(2, 5, 7, 9))
    checkpoint.save(checkpoint.Llama(shape), tmp_path / "model")
    Tokenizer.load(base).save(tmp_path / "model")
    assert llama2("export", tmp_path / "model", "--to", "gguf", "--out", tmp_path / "m.gguf") == 0
    assert "answers end at 4 ids, and GGUF has places for 3: 9 left out" in capsys.readouterr().err
    assert open_model(tmp_path / "m.gguf").config.stops == (2, 5, 7)
