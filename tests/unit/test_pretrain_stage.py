"""Pretraining: bits per byte over the very targets scored, tokens counted, and no schedule squeezed
in silence."""

import bz2
import json
import lzma
import math

import numpy as np
import pytest
import torch
from commands import llama2
from torch import nn

from llama2.data.compress import HeldoutText, spell_targets
from llama2.data.pack import Segment
from llama2.data.shards import Shards, write_shards
from llama2.formats import checkpoint
from llama2.model.llama import Llama, LlamaConfig
from llama2.ranks import Ranks
from llama2.records import Document
from llama2.stages import pretrain
from llama2.tokenizer import CHAT_TEMPLATE
from llama2.tokenizer.chat_settings import read_chat_template, read_stop_ids
from llama2.tokenizer.train import train

TEXTS = [
    f"The mill number {number} stands by the river{' and turns' * (number % 5)}."
    for number in range(60)
]
TEXTS += ["", "Füße → 漢字 \U0001f642", "  two spaces lead", "a line\nand another "]
SMALL = (
    "--architecture.hidden-size",
    16,
    "--architecture.num-hidden-layers",
    1,
    "--architecture.num-attention-heads",
    2,
    "--architecture.num-key-value-heads",
    2,
    "--architecture.intermediate-size",
    24,
    "--architecture.max-position-embeddings",
    64,
)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    """A `tokenize` run of two sources, and its tokenizer."""
    directory = tmp_path_factory.mktemp("tokens")
    words = train(TEXTS, 330, directory)
    for split in ("train", "validation"):
        write_shards([Document(text) for text in TEXTS], words, directory / split / "mills")
        write_shards(
            [Document(f"Fact {n} is known.") for n in range(30)], words, directory / split / "facts"
        )

    return directory, words


class Uniform(nn.Module):
    """Gives every token of the vocabulary the same probability."""

    def __init__(self, size):
        super().__init__()
        self.size = size

    def forward(self, tokens_BT, targets_BT=None, **_):
        return torch.full(tokens_BT.shape, -math.log(self.size), dtype=torch.float64)


def validation(tokens, **changes):
    directory, words = tokens
    settings = {
        "out": "x",
        "shards": directory,
        "sequence_length": 16,
        "micro_batch_size": 8,
        "validation_rows": 10_000,
    } | changes
    return pretrain.TextValidation(pretrain.Config(**settings), words, Ranks.alone())


def exact(targets, size, count):
    return targets * math.log2(size) / count


def test_a_uniform_model_needs_log2_v_bits_for_every_target(tokens):
    directory, words = tokens
    ids = np.concatenate(
        [Shards(directory / "validation" / name).lengths_N for name in ("facts", "mills")]
    )
    bytes_ = sum(
        len(text.encode()) for text in [*TEXTS, *(f"Fact {n} is known." for n in range(30))]
    )

    for length in (16, 64, 5000):  # whether rows cut documents or not
        checked = validation(tokens, sequence_length=length)
        assert checked.text.size == bytes_
        found = checked(Uniform(words.vocab_size))
        assert found["validation/bits_per_byte"] == pytest.approx(
            exact(int(ids.sum()) - len(ids), words.vocab_size, bytes_), rel=1e-12
        )
        assert found["validation/loss"] == pytest.approx(math.log(words.vocab_size), rel=1e-12)


def test_the_first_rows_alone_are_scored_over_their_own_bytes(tokens):
    _, words = tokens
    checked = validation(tokens, validation_rows=3)
    assert checked.text.size < 200
    assert checked(Uniform(words.vocab_size))["validation/bits_per_byte"] == pytest.approx(
        exact(3 * 16, words.vocab_size, checked.text.size), rel=1e-12
    )


@pytest.mark.parametrize("text", TEXTS[-4:])
def test_targets_spell_their_text(tokens, text):
    _, words = tokens
    ids = np.array([words.bos, *words.encode(text), words.eos])
    assert spell_targets(Segment(ids, ids >= 0), words) == text.encode()

    # the second half of a document begins with the last token of the first
    for cut in range(1, len(ids) - 1):
        halves = [Segment(part, part >= 0) for part in (ids[: cut + 1], ids[cut:])]
        assert b"".join(spell_targets(half, words) for half in halves) == text.encode()


def test_compressors_are_given_the_same_bytes(tokens):
    checked, words = validation(tokens), tokens[1]
    rows = [list(checked.rows[index]) for index in checked.few]
    documents, current = [], []

    for token in (token for row in rows for segment in row for token in segment.ids[1:].tolist()):
        if token == words.eos:
            documents, current = [*documents, words.decode(current).encode()], []
        else:
            current.append(token)

    text = b"\n".join(sorted(documents))
    found = checked.text.measure_bits_per_byte()
    size = sum(map(len, documents))
    assert found == {
        "xz_bits_per_byte": 8 * len(lzma.compress(text, preset=9)) / size,
        "bzip2_bits_per_byte": 8 * len(bz2.compress(text, 9)) / size,
    }
    assert HeldoutText([], words).measure_bits_per_byte() == {}


def run(tokens, out, *more):
    return llama2(
        "pretrain",
        "--shards",
        tokens[0],
        "--out",
        out,
        *SMALL,
        "--sequence-length",
        16,
        "--batch-size",
        4,
        "--training.plan.warmup-steps",
        1,
        *more,
    )


def test_tokens_read_are_those_of_the_documents(tokens, tmp_path, capsys):
    assert run(tokens, tmp_path / "out", "--epochs", 2) == 0
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    lengths = [Shards(tokens[0] / "train" / name).lengths_N for name in ("facts", "mills")]
    assert (
        summary["tokens"]
        == summary["trained"]
        == 2 * int(sum((length - 1).sum() for length in lengths))
    )
    assert summary["passes"] == {"facts": 2.0, "mills": 2.0}
    heard = capsys.readouterr().err
    bits = summary["validation"]["bits_per_byte"]
    assert (
        f"{summary['tokens']:,} tokens read; {bits:.3f} bits per byte on {summary['validation_bytes']:,} bytes of "
        f"held-out text (xz -9: {summary['xz_bits_per_byte']:.3f}, "
        f"bzip2 -9: {summary['bzip2_bits_per_byte']:.3f})"
    ) in heard


def test_fewer_tokens_than_max_steps_asks_for_are_refused_with_the_epochs_that_would_do(
    tokens, tmp_path, one_line
):
    heard = one_line(
        "pretrain",
        "--shards",
        tokens[0],
        "--out",
        tmp_path / "out",
        *SMALL,
        "--sequence-length",
        16,
        "--batch-size",
        4,
        "--training.plan.max-steps",
        500,
    )
    places = sum(
        int((Shards(tokens[0] / "train" / name).lengths_N - 1).sum()) for name in ("facts", "mills")
    )
    steps = math.ceil(math.ceil(places / 16) / 4)
    epochs = math.ceil(1000 * 500 * 64 / places) / 1000
    assert heard == (
        f"max_steps 500 would read 32,000 tokens, epochs 1 of {tokens[0]} are {places:,}: {steps} steps; "
        f"give --epochs {epochs:g} to read them that often, or --training.plan.max-steps {steps}"
    )
    assert run(tokens, tmp_path / "out", "--training.plan.max-steps", 500, "--epochs", epochs) == 0
    assert json.loads((tmp_path / "out/summary.json").read_text())["steps"] == 500


def test_a_source_without_a_share_and_few_updates_are_warned_of(tokens, tmp_path):
    assert run(tokens, tmp_path / "out", "--mixture.facts", 1, "--epochs", 0.5) == 0
    few, *more = json.loads((tmp_path / "out/warnings.json").read_text())[::-1]
    assert more == ["the mixture gives 'mills' no share: none of it is read"]
    assert "fewer than 50 teach little; lower --batch-size to " in few


def test_rows_beyond_the_context_are_refused_with_the_flag(tokens, tmp_path, one_line):
    heard = one_line("pretrain", "--shards", tokens[0], "--out", tmp_path / "out", *SMALL)
    assert (
        heard
        == "sequence_length 4096 exceeds the model's context 64; give --sequence-length 64 or less"
    )


def test_a_source_with_a_share_beyond_its_size_is_read_more_often(tokens, tmp_path):
    """`mixture` weighs tokens: half of them from the smaller source means that it is read more
    often."""
    assert run(tokens, tmp_path / "out", "--mixture.facts", 1, "--mixture.mills", 1) == 0
    passes = json.loads((tmp_path / "out/summary.json").read_text())["passes"]
    lengths = {name: Shards(tokens[0] / "train" / name).lengths_N for name in passes}
    total = sum(int(length.sum()) for length in lengths.values())

    for name, times in passes.items():
        assert times == pytest.approx(0.5 * total / int(lengths[name].sum()), rel=0.03)


def test_a_base_keeps_its_template_and_its_ends(tokens, tmp_path):
    """Llama 2's is written by `tokenize` for a model that begins here, and by no step that does not
    teach it."""
    assert run(tokens, tmp_path / "new", "--training.plan.max-steps", 2) == 0
    assert read_chat_template(tmp_path / "new") == CHAT_TEMPLATE
    for template in (None, "{{ theirs }}"):
        theirs = tmp_path / f"theirs-{template is None}"
        checkpoint.save(
            Llama(LlamaConfig(tokens[1].vocab_size, 16, 24, 1, 2, 2, 64, eos_token_id=(2, 9))),
            theirs,
        )
        tokens[1].with_chat_template(template).save(theirs)
        out = tmp_path / f"out-{template is None}"
        assert (
            llama2(
                "pretrain",
                "--shards",
                tokens[0],
                "--model",
                theirs,
                "--out",
                out,
                "--sequence-length",
                16,
                "--batch-size",
                4,
                "--training.plan.warmup-steps",
                1,
                "--training.plan.max-steps",
                2,
            )
            == 0
        )
        assert read_chat_template(out) == template
        assert read_stop_ids(out) == (2, 9)
