"""Weights of fewer bits: what is rounded and how, and what `llama2 quantize` says it costs."""

import io
import json
import math
import sys
from dataclasses import replace

import pytest
import torch
from commands import llama2
from servers import serving
from torch import nn

from llama2 import records
from llama2.errors import UserError
from llama2.evaluate.quantization import cut_windows, measure, measure_coverage
from llama2.formats.checkpoint import load
from llama2.generate import cpu_decoder
from llama2.generate.engine import Engine
from llama2.generate.sampling import Sampling
from llama2.generate.score import compute_logprobs, predict_tokens
from llama2.model import quantize
from llama2.model.llama import Llama, LlamaConfig
from llama2.records import Document

SHAPE = LlamaConfig(96, 64, 128, 2, 4, 2, 64)
TIED = replace(SHAPE, tie_word_embeddings=True)


@pytest.fixture
def torchao():
    return pytest.importorskip("torchao.quantization")


@pytest.fixture(scope="module")
def text(shared, world):
    """Three documents, as JSON Lines and as plain text."""
    dialogs = list(records.read(records.Dialog, world / "demonstrations.jsonl"))[:3]
    texts = ["\n".join(turn.content for turn in dialog.messages) for dialog in dialogs]
    records.write(
        shared / "heldout.jsonl", [Document(each, str(index)) for index, each in enumerate(texts)]
    )
    (shared / "heldout.txt").write_text("\n\n".join(each.replace("\n\n", "\n") for each in texts))

    return shared / "heldout.jsonl"


def without_torchao(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)


# --- rounding ---


@pytest.mark.parametrize("size", [(16, 32), (5, 70)])
def test_eight_bits_are_within_half_a_scale(size):
    weight = torch.randn(size)
    found = quantize.quantize(weight, "int8")
    assert found.integers_OI.dtype == torch.int8
    assert ((found.dequantize() - weight).abs() <= 0.5001 * found.scales_OG).all()
    assert torch.equal(quantize.quantize(torch.zeros(size), "int8").dequantize(), torch.zeros(size))


@pytest.mark.parametrize("offset", [0.0, 3.0, -3.0])
def test_four_bits_are_torchaos(torchao, offset):
    weight = torch.randn(48, 96) + offset
    layer = nn.Linear(96, 48, bias=False)
    layer.weight = nn.Parameter(weight)
    torchao.quantize_(
        layer,
        torchao.IntxWeightOnlyConfig(
            torch.int4, torchao.PerGroup(32), torchao.MappingType.ASYMMETRIC
        ),
    )
    found, theirs = quantize.quantize(weight, "int4"), layer.weight.dequantize()
    assert ((found.dequantize() - theirs).abs() <= theirs.abs() / 256 + 1e-6).all(), (
        "scales are bf16 here"
    )
    grid = found.integers_OI.unique()
    assert (grid.min(), grid.max(), len(grid)) == (-8, 7, 16)
    error = (found.dequantize() - weight).view(48, 3, 32).abs().amax(2)
    assert (error <= 0.6 * found.scales_OG).all()


@pytest.mark.parametrize("inputs", [1, 31, 32, 33, 70])
def test_inputs_that_make_no_whole_group_are_rounded_too(torchao, inputs):
    weight = torch.randn(7, inputs)
    found = quantize.quantize(weight, "int4")
    assert found.dequantize().shape == weight.shape
    assert (found.dequantize() - weight).norm() < 0.1 * weight.norm()
    assert found.integers_OI.shape[1] % 32 == 0


def test_importing_torchao_says_nothing(torchao, caplog):
    with caplog.at_level("WARNING"):
        quantize.quantize(torch.randn(4, 32), "int4")

    assert caplog.records == []


@pytest.mark.parametrize("shape", [SHAPE, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_what_is_rounded(shape, bits):
    rows = {row["name"]: row for row in measure_coverage(shape, bits)}
    assert all(
        rows[f"model.layers.*.{name}.weight"]["kept_in"] == bits
        for name in (
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.o_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
            "mlp.down_proj",
        )
    )
    assert (
        rows["model.norm.weight"]["reason"]
        == rows["model.layers.*.input_layernorm.weight"]["reason"]
        == "a vector"
    )
    head = "model.embed_tokens.weight" if shape.tie_word_embeddings else "lm_head.weight"
    assert rows[head]["kept_in"] == ("int8" if bits == "int8" else "bf16")

    if not shape.tie_word_embeddings:
        assert rows["model.embed_tokens.weight"]["reason"] == "looked up, not multiplied"

    assert sum(row["before"] for row in rows.values()) == 4 * shape.parameters()
    assert all(bool(row["reason"]) == (row["kept_in"] == "bf16") for row in rows.values())


def held_bytes(value: object) -> int:
    """The bytes of a tensor, or of those that a struct points to."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()

    return sum(map(held_bytes, value.values.values()))


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_sizes_are_those_of_what_is_decoded_with(bits):
    if bits == "int4":
        pytest.importorskip("torchao")

    model = Llama(SHAPE).bfloat16()
    if not cpu_decoder.supports(model):
        pytest.skip("no compiler")

    integers = {
        name: quantize.quantize(weight, bits)
        for name, weight in model.named_parameters()
        if not quantize.reason_to_keep(name, weight, bits, tied=False)
    }
    decoder = cpu_decoder.CpuDecoder(model, integers)
    read = {name: decoder._model.values[name] for name in ("embedding", "last_norm", "head")}
    held = sum(map(held_bytes, (*read.values(), *decoder._layers)))
    vectors = sum(weight.numel() for weight in model.parameters() if weight.dim() == 1)
    assert held - 2 * vectors == sum(row["after"] for row in measure_coverage(SHAPE, bits)), (
        "norms are decoded with in fp32"
    )


# --- the measure ---


def test_every_token_is_predicted_once(tokenizer):
    documents = [
        Document("one two three " * 20, "a"),
        Document("four", "b"),
        Document("never read", "c"),
    ]
    whole = [[tokenizer.bos, *tokenizer.encode(each.text), tokenizer.eos] for each in documents]
    count, rows = cut_windows(documents, tokenizer, 16, sum(map(len, whole[:2])) - 2)
    assert count == 2
    assert all(2 <= len(row) <= 16 for row in rows)
    assert [token for row in rows for token in row[1:]] == [
        token for ids in whole[:2] for token in ids[1:]
    ]
    assert sum(len(row) - 1 for row in cut_windows(documents, tokenizer, 16, 37)[1]) == 37


def test_the_loss_is_that_of_the_weights_that_are_served(policy, tokenizer, torchao):
    """The engine draws with integers, here its weights are multiplied as the bf16 numbers they
    stand for."""
    model, precisions = load(policy).eval().requires_grad_(False), ("int8", "int4")
    prompts = [
        [tokenizer.bos, *tokenizer.encode(word)]
        for word in ("One", "My name", "The", "[INST] Hello [/INST]")
    ]
    for precision in precisions:
        engine = Engine(model, precision=precision)
        results = [row[0] for row in engine.generate(prompts, Sampling(max_tokens=40, seed=3))]
        rows = [list(each.prompt + each.tokens) for each in results]
        own = [value for each in results for value in each.logprobs]
        found = [
            value
            for each, row in zip(results, predict_tokens(engine.refresh(), rows, "bf16"))
            for value in row[0][len(each.prompt) - 1 :]
        ]
        other = [
            value
            for each, row in zip(results, compute_logprobs(model, rows, "fp32"))
            for value in row[len(each.prompt) - 1 :]
        ]
        gap, loss = (
            sum(abs(a - b) for a, b in zip(own, theirs)) / len(own) for theirs in (found, other)
        )
        assert gap < 0.02
        assert max(abs(a - b) for a, b in zip(own, found)) < 0.15
        assert loss > 0

        if precision == "int4":
            assert gap < loss / 2, "what rounding costs is more than what bf16 blurs"


def test_predictions_are_logprobs_and_greedy_choices():
    model = Llama(SHAPE, 2)
    rows = [[1, *range(5, 5 + length)] for length in (3, 1, 9, 0, 40)]
    found = predict_tokens(model, rows, "fp32", batch_tokens=30)

    for row, (own, best), expected in zip(rows, found, compute_logprobs(model, rows, "fp32")):
        assert own == pytest.approx(expected, abs=1e-5)
        with torch.no_grad():
            assert best == model(torch.tensor([row]))[0, :-1].argmax(-1).tolist()


def test_the_report(policy, text, tokenizer, tmp_path, capsys, torchao):
    assert llama2("quantize", policy, "--data", text, "--out", tmp_path / "new", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((tmp_path / "new/report.json").read_text())
    rows = [
        [tokenizer.bos, *tokenizer.encode(each.text), tokenizer.eos]
        for each in records.read(Document, text)
    ]
    logp = [value for row in compute_logprobs(load(policy), rows, "fp32") for value in row]
    assert (report["documents"], report["tokens"]) == (3, len(logp))
    assert report["fp32"]["perplexity"] == pytest.approx(math.exp(-sum(logp) / len(logp)), rel=1e-5)
    losses = [report[name]["mean_difference"] for name in ("bf16", "int8", "int4")]
    assert 0 < losses[0] < losses[2]
    assert losses[1] < losses[2]
    sizes = [report[name]["bytes"] for name in ("fp32", "bf16", "int8", "int4")]
    assert sizes[1] * 2 == sizes[0]
    assert max(sizes[2:]) < sizes[1]

    for name in ("bf16", "int8", "int4"):
        one = report[name]
        assert one["change"] == pytest.approx(one["perplexity"] / report["fp32"]["perplexity"] - 1)
        assert one["mean_difference"] <= one["max_difference"]
        assert 0 <= one["other_choices"] <= 1


def test_the_same_weights_lose_nothing():
    model = Llama(SHAPE, 1).eval()
    rows = [[1, *range(5, 40)]]
    found = measure(model, rows, ("fp32",))["fp32"]
    assert (found["mean_difference"], found["max_difference"], found["other_choices"]) == (0, 0, 0)

    with torch.no_grad():
        for name, weight in model.named_parameters():
            # whole numbers of one scale, and bf16's
            if name != "model.embed_tokens.weight" and weight.dim() == 2:
                weight.copy_((weight * 2000).round().clamp(-126, 126) / 2048).view(-1)[0] = (
                    127 / 2048
                )
                weight[:, 0] = 127 / 2048

        exact = predict_tokens(model.bfloat16().float(), rows, "fp32")
        served = predict_tokens(Engine(model, precision="int8").refresh().float(), rows, "fp32")

    assert served[0][0] == pytest.approx(exact[0][0], abs=1e-6)


def test_the_tables(policy, text, capsys):
    assert (
        llama2(
            "quantize",
            policy,
            "--data",
            text.with_suffix(".txt"),
            "--split",
            "paragraph",
            "--precisions",
            "bf16",
            "int8",
            "--tokens",
            50,
        )
        == 0
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "int8: what is rounded"
    assert next(line for line in lines if "q_proj" in line).split()[1:6] == [
        "2",
        "32",
        "x",
        "32",
        "int8",
    ]
    assert next(line for line in lines if "embed_tokens" in line).endswith(
        "looked up, not multiplied"
    )
    assert any(line.startswith("50 tokens of ") for line in lines)
    assert [line.split()[0] for line in lines[-3:]] == ["fp32", "bf16", "int8"]


# --- mistakes, and where it may be asked for ---


def test_without_torchao_only_four_bits_are_missing(policy, text, one_line, monkeypatch, capsys):
    without_torchao(monkeypatch)
    for words in (
        ("quantize", policy, "--data", text),
        ("chat", policy, "--precision", "int4"),
        ("serve", policy, "--precision", "int4", "--port", 0),
    ):
        assert one_line(*words) == (
            "this needs the package 'torchao', which is not installed; "
            "pip install 'llama2[quantize]'"
        )

    with pytest.raises(UserError, match="torchao"):
        Engine(Llama(SHAPE), precision="int4")

    assert llama2("quantize", policy, "--data", text, "--precisions", "int8") == 0


def test_mistakes(policy, text, scorers, tmp_path, one_line):
    assert "no such file" in one_line(
        "quantize", policy, "--data", tmp_path / "none.txt", "--precisions", "int8"
    )
    assert "'--precisions': must be 'bf16', 'int8' or 'int4'" in one_line(
        "quantize", policy, "--data", text, "--precisions", "int2"
    )
    assert "this is a reward model" in one_line("quantize", scorers[0], "--data", text)

    for verb in ("ppo", "rejection"):
        said = one_line(
            verb,
            "--policy",
            policy,
            "--rewards.helpful",
            scorers[0],
            "--prompts",
            text,
            "--out",
            tmp_path / "out",
            "--sample.precision",
            "int8",
        )
        assert "'sample.precision': rounded weights are for chat, serve and evaluate" in said


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_chat_and_server_take_it(policy, tokenizer, precision, monkeypatch, capsys):
    if precision == "int4":
        pytest.importorskip("torchao")

    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n"))
    assert llama2("chat", policy, "--precision", precision, "--max-tokens", 8) == 0
    ids = [tokenizer.bos, *tokenizer.encode("My name is what it is")]
    engine = Engine(load(policy, dtype=torch.bfloat16).requires_grad_(False), precision=precision)

    with serving(policy, precision=precision) as served:
        answer = served.post("completions", prompt=ids, echo=True, max_tokens=0, logprobs=1).json()

    found = answer["choices"][0]["logprobs"]["token_logprobs"][1:]
    assert found == pytest.approx(predict_tokens(engine.refresh(), [ids], "bf16")[0][0], abs=1e-3)
