"""`llama2 verify`: finds what differs and where, says nothing differs when nothing does, and never
holds a model."""

from __future__ import annotations

import json
import math
import os
import shutil
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from commands import llama2
from sources import frugal, model_of, scorer_of, source_of
from torch import Tensor

from llama2.convert import compare, tokenizer_probes, verify
from llama2.errors import UserError
from llama2.formats import checkpoint
from llama2.formats.stored_model import StoredModel
from llama2.model.llama import Layer, Llama, LlamaConfig
from llama2.runs import completion
from llama2.tokenizer import Tokenizer, sentencepiece_model, train

SHAPE = LlamaConfig(
    vocab_size=420,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=700,
)


@pytest.fixture
def source(tmp_path: Path) -> StoredModel:
    return source_of(model_of(SHAPE), tmp_path)


def changed(source: StoredModel, name: str, change: Callable[[Tensor], object]) -> StoredModel:
    """A checkpoint that differs in one tensor."""

    def read() -> Tensor:
        tensor = source.tensors[name].read()
        change(tensor)
        return tensor

    return replace(
        source, tensors={**source.tensors, name: replace(source.tensors[name], read=read)}
    )


def add(row: int, column: int, by: float) -> Callable[[Tensor], object]:
    return lambda tensor: tensor[row, column].add_(by)


def test_a_checkpoint_equals_itself(source: StoredModel) -> None:
    found = verify.compare_models(source, source)
    assert found.differences(0.0) == []
    assert found.outputs is not None
    assert (found.outputs.positions, found.outputs.largest, found.outputs.agreeing) == (
        700,
        0.0,
        1.0,
    )


def test_the_largest_difference_and_its_tensor(source: StoredModel) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    other = changed(changed(source, name, add(3, 5, 0.25)), "lm_head.weight", add(7, 1, -0.125))
    found = compare.compare_tensors(source, other)
    assert (found.count, found.equal, found.name) == (30, 28, name)
    assert found.largest == pytest.approx(0.25, abs=1e-6)
    assert found.relative_name == name
    numbers = torch.cat([stored.read().flatten() for stored in source.tensors.values()])
    assert found.spread == pytest.approx(
        math.sqrt((0.25**2 + 0.125**2) / numbers.square().sum().item()), rel=1e-4
    )


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("kind", ["self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"])
def test_the_first_layer_that_differs(source: StoredModel, kind: str, layer: int) -> None:
    other = changed(source, f"model.layers.{layer}.{kind}.weight", add(0, 0, 3.0))
    found = compare.compare_outputs(source, other, 64, 1e-4, torch.device("cpu"))
    assert found.first_layer == f"model.layers.{layer}"
    assert found.largest > 1e-3


def test_outputs_are_those_of_the_whole_model_and_their_place_is_right(source: StoredModel) -> None:
    """Positions, tokens and sizes against logits of models that are whole."""
    name = "model.layers.2.self_attn.v_proj.weight"
    other = changed(source, name, add(1, 1, 0.5))
    models = []

    for side in (source, other):
        models.append(Llama(SHAPE).eval())
        models[-1].load_state_dict({name: stored.read() for name, stored in side.tensors.items()})

    tokens_1T = torch.randint(
        SHAPE.vocab_size, (1, 600), generator=torch.Generator().manual_seed(0)
    )
    tokens_1T[0, 0] = 1
    with torch.no_grad():
        apart_TV = (models[0](tokens_1T) - models[1](tokens_1T))[0].abs()

    for tolerance in (1e-4, apart_TV.max().item() * 0.9):
        found = compare.compare_outputs(source, other, 600, tolerance, torch.device("cpu"))
        assert found.largest == pytest.approx(apart_TV.max().item(), abs=1e-5)
        assert found.mean == pytest.approx(apart_TV.mean().item(), abs=1e-6)
        assert (found.position, found.token) == divmod(int(apart_TV.argmax()), SHAPE.vocab_size)
        first = int((apart_TV.amax(-1) > tolerance).nonzero()[0])
        assert (found.first_position, found.first_token) == (first, int(apart_TV[first].argmax()))


def test_a_difference_in_one_token_is_found_where_it_is_first_read(source: StoredModel) -> None:
    """Attention is causal: nothing before the token can differ."""
    tokens_1T = torch.randint(
        SHAPE.vocab_size, (1, 700), generator=torch.Generator().manual_seed(0)
    )
    token = next(int(token) for token in tokens_1T[0, 400:] if token not in tokens_1T[0, :400])
    found = verify.compare_models(
        source, changed(source, "model.embed_tokens.weight", add(token, 3, 1.0))
    )
    assert found.outputs is not None
    assert found.outputs.first_position == (tokens_1T[0] == token).nonzero()[0].item()
    assert found.outputs.first_layer == "model.embed_tokens"


def test_numbers_that_are_none_are_different(source: StoredModel) -> None:
    name = "model.norm.weight"
    other = changed(source, name, lambda tensor: tensor[0].fill_(math.nan))
    found = verify.compare_models(source, other, length=20)
    assert found.tensors is not None
    assert (found.tensors.largest, found.tensors.name) == (math.inf, name)
    assert found.differences(1e9)
    assert compare.compare_tensors(other, other).largest == 0


def test_constants_and_shapes_that_differ(source: StoredModel) -> None:
    for name, value in (
        ("rope_theta", 20000.0),
        ("rms_norm_eps", 1e-6),
        ("max_position_embeddings", 600),
    ):
        other = replace(source, config=replace(SHAPE, **{name: value}))
        assert any(
            name in line for line in verify.compare_models(source, other, length=5).differences(1.0)
        )

    wider = source_of(model_of(replace(SHAPE, intermediate_size=64)), Path("wider"))
    found = verify.compare_models(source, wider)
    assert found.differences(1.0) == ["intermediate_size: 48 and 64"]
    assert found.tensors is None
    scorer = source_of(scorer_of(SHAPE), Path("scorer"))
    assert verify.compare_models(source, scorer).differences(1.0) == [
        "a language model and a reward model"
    ]


def test_what_metas_format_does_not_hold_is_a_note(source: StoredModel) -> None:
    other = replace(source, format="meta", config=replace(SHAPE, max_position_embeddings=4096))
    found = verify.compare_models(source, other, length=5)
    assert found.differences(0.0) == []
    assert any("max_position_embeddings: 700 and 4096" in note for note in found.notes)


def test_tied_embeddings_equal_a_head_with_the_same_numbers(tmp_path: Path) -> None:
    tied = source_of(model_of(replace(SHAPE, tie_word_embeddings=True)), tmp_path)
    apart = replace(
        tied,
        config=SHAPE,
        tensors={**tied.tensors, "lm_head.weight": tied.tensors["model.embed_tokens.weight"]},
    )
    assert verify.compare_models(tied, apart, length=20).differences(0.0) == []
    other = changed(apart, "lm_head.weight", add(5, 5, 1.0))
    found = verify.compare_models(tied, other, length=20)
    assert found.tensors is not None
    assert found.outputs is not None
    assert found.tensors.name == found.outputs.first_layer == "lm_head.weight"


def test_reward_models_are_compared_by_their_scores(tmp_path: Path) -> None:
    scorer = scorer_of(SHAPE)
    source = source_of(scorer, tmp_path)
    other = changed(source, "score.weight", add(0, 2, 0.5))
    found = compare.compare_outputs(source, other, 50, 1e-4, torch.device("cpu"))
    assert (found.kind, found.first_layer) == ("scores", "score.weight")
    tokens_1T = torch.randint(SHAPE.vocab_size, (1, 50), generator=torch.Generator().manual_seed(0))
    tokens_1T[0, 0] = 1

    with torch.no_grad():
        before_T = scorer(tokens_1T)[0]
        scorer.score.weight[0, 2] += 0.5
        apart_T = (scorer(tokens_1T)[0] - before_T).abs()

    assert found.largest == pytest.approx(apart_T.max().item(), abs=1e-5)
    assert found.position == int(apart_T.argmax())


def test_no_more_than_a_layer_is_in_memory(
    source: StoredModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors in pairs, one of each; and the walk drops a layer before it loads the next, of either
    model."""
    compare.compare_tensors(frugal(source), frugal(source))
    made: list[weakref.ref[Layer]] = []
    load = compare._load_layer

    def watched(side: StoredModel, index: int, like: Tensor) -> Layer:
        assert all(reference() is None for reference in made)
        layer = load(side, index, like)
        made.append(weakref.ref(layer))

        return layer

    monkeypatch.setattr(compare, "_load_layer", watched)
    compare.compare_outputs(source, source, 20, 1e-4, torch.device("cpu"))
    assert len(made) == 2 * SHAPE.num_hidden_layers


# --- tokenizers ---
def test_tokenizers(tmp_path: Path, shared: Path, tokenizer: Tokenizer) -> None:
    own = shared / "tokenizer" / "tokenizer.model"
    assert tokenizer_probes.compare_tokenizers(own, own).difference is None
    assert tokenizer_probes.compare_tokenizers(own, own).identical
    train(
        ["other words for another vocabulary, quite another one " * 20, "zebra quagga okapi " * 20],
        300,
        tmp_path,
    )
    found = tokenizer_probes.compare_tokenizers(own, tmp_path / "tokenizer.model")
    assert found.difference is not None
    assert any("420 and 300" in note for note in found.notes)


def test_the_same_items_merged_in_another_order_are_another_tokenizer(
    tmp_path: Path, shared: Path, tokenizer: Tokenizer
) -> None:
    known = sentencepiece_model.load(shared / "tokenizer" / "tokenizer.model")
    items = [
        replace(item, score=-500.0 - item.score)
        if item.kind == sentencepiece_model.NORMAL
        else item
        for item in known.items
    ]
    model = sentencepiece_model.build(replace(known, items=items))
    (tmp_path / "other.model").write_bytes(model)
    difference = tokenizer_probes.compare_tokenizers(
        shared / "tokenizer" / "tokenizer.model", tmp_path / "other.model"
    ).difference
    assert difference is not None
    assert difference.startswith("the text ")


def test_the_texts_are_hard(tokenizer: Tokenizer) -> None:
    found = tokenizer_probes.list_texts()
    assert len(found) > 250
    for part in ("</s>", "[INST]", "\x00", "😀", "\u0301", "ا", "的", "\n\n", "  "):
        assert any(part in text for text in found)

    assert max(map(len, found)) > 5000
    for text in tokenizer_probes.UNWRITABLE:
        with pytest.raises(UserError, match="half of a surrogate pair"):
            tokenizer.encode(text)


# --- the command ---
def test_the_command(tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(base, tmp_path / "same")
    assert llama2("verify", base, tmp_path / "same") == 0
    assert capsys.readouterr().out.splitlines()[-1].split() == ["verdict", "equal"]
    model = checkpoint.load(base)

    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] += 0.5

    checkpoint.save(model, tmp_path / "other")
    assert llama2("verify", base, tmp_path / "other", "--json", "--length", 100) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["equal"] is False
    assert found["tensors"]["name"] == "model.layers.1.mlp.down_proj.weight"
    assert found["outputs"]["first_layer"] == "model.layers.1"
    assert found["outputs"]["positions"] == 100
    assert found["tokenizer"] is None
    assert llama2("verify", base, tmp_path / "other", "--tolerance", 100) == 0
    assert llama2("verify", base, tmp_path / "other", "--length", 0) == 1
    assert "layers.1.mlp.down_proj" in capsys.readouterr().out.splitlines()[-1]


def test_json_has_no_infinity(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = checkpoint.load(base)
    with torch.no_grad():
        model.model.norm.weight[3] = math.nan

    checkpoint.save(model, tmp_path / "other")
    assert llama2("verify", base, tmp_path / "other", "--json", "--length", 10) == 1
    found = json.loads(
        capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON")
    )
    assert found["tensors"]["largest"] is None
    assert found["differences"][0] == "tensors differ by up to inf, in model.norm.weight"


def test_mistakes(base: Path, one_line: Callable[..., str]) -> None:
    assert (
        "no finished run, nor a recipe's directory with some in it; give one, or two"
        in one_line("verify", base)
    )
    assert "3 checkpoints are given" in one_line("verify", base, base, base)
    assert "no such file" in one_line("verify", base, base / "nowhere")
    assert "exceeds the context" in one_line("verify", base, base, "--length", 257)


def test_a_length_beyond_the_context_is_refused(source: StoredModel) -> None:
    with pytest.raises(UserError, match="exceeds the context of the models, 700"):
        verify.compare_models(source, source, length=701)


# --- a run and what it wrote ---
def _flip(file: Path) -> None:
    """One bit in the middle; neither the size nor the time tells."""
    status, content = file.stat(), bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_all_that_differs_in_a_run_is_named(
    policy: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = Path(shutil.copytree(policy, tmp_path / "recipe/run"))
    (tmp_path / "recipe/steps.json").write_text('["run", "waiting"]')
    monkeypatch.setattr(completion, "CHEAP", 0)  # as if all files were large
    assert llama2("verify", run) == 0
    assert capsys.readouterr().out == f"{run}: all that this run wrote is there, unchanged\n"
    _flip(run / "model.safetensors")
    (run / "config.json").write_text("{}")

    for place in (run, run.parent):
        assert llama2("verify", place) == 1
        first, second = capsys.readouterr().out.splitlines()
        assert first.startswith(f"{run / 'config.json'}: it has 2 bytes, and this run wrote ")
        assert second == f"{run / 'model.safetensors'}: its content is not what this run wrote"

    assert llama2("verify", run, "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["whole"], found["runs"]) == (False, {str(run): [first, second]})
    (run / "COMPLETE").write_text("")
    assert llama2("verify", run) == 1
    assert capsys.readouterr().out == f"{run / 'COMPLETE'}: the file is empty, JSON was expected\n"
