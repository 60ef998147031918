"""Llama 2's relatives: what must not change a result does not, with heads of another size, scaled
positions, biases and tied heads."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch
from relatives import PLAIN, RELATIVES
from sources import scorer_of
from torch import Tensor

from llama2.generate import cpu_decoder
from llama2.generate.engine import Engine
from llama2.generate.generator import Completion
from llama2.generate.sampling import Sampling
from llama2.kernels import fused, install, shapes
from llama2.model import tensors
from llama2.model.config import LlamaConfig
from llama2.model.llama import Llama
from llama2.model.quantize import WeightPrecision
from llama2.stages.common.memory import Tower

SAMPLING = Sampling(max_tokens=40, seed=7, stop=())
each_relative = pytest.mark.parametrize("shape", RELATIVES.values(), ids=RELATIVES)
needs_compiler = pytest.mark.skipif(
    not shutil.which("g++") and not shutil.which("clang++"), reason="no compiler"
)


def make_model(shape: LlamaConfig) -> Llama:
    """Weights so wide that a wrong cache shows in the tokens; norms and biases of their own."""
    model = install(Llama(shape, 1))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0.0, 0.5, generator=generator)
            elif parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5, generator=generator)
            else:
                parameter.mul_(5)

    return model.eval()


def prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 96, (length,), generator=generator).tolist() for length in lengths]


def answer(
    model: Llama, asked: list[list[int]], slots: int = 8, precision: WeightPrecision = "fp32"
) -> list[Completion]:
    engine = Engine(model, slots=slots, precision=precision)
    return [row[0] for row in engine.generate(asked, SAMPLING)]


def assert_same(some: list[Completion], others: list[Completion]) -> None:
    for one, other in zip(some, others, strict=True):
        assert one.tokens == other.tokens
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)


@each_relative
def test_a_state_dict_has_the_tensors_that_are_described(shape: LlamaConfig) -> None:
    model, scorer = Llama(shape), scorer_of(shape)
    described = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    assert list(described.items()) == list(tensors.shapes(shape).items())
    assert sum(weight.numel() for weight in model.parameters()) == shape.parameters()
    assert sum(weight.numel() for weight in scorer.parameters()) == Tower(shape, True).parameters
    assert Tower(shape).root + shape.num_hidden_layers * Tower(shape).block == shape.parameters()

    for name, weight in model.named_parameters():
        if weight.dim() == 1:
            assert bool((weight == (0.0 if name.endswith("bias") else 1.0)).all())


@each_relative
def test_the_rows_of_rotary_pairs_go_and_come_back(shape: LlamaConfig) -> None:
    for name, weight in make_model(shape).state_dict().items():
        heads = tensors.rotary_heads(name, shape)
        assert (heads is None) == ("q_proj" not in name and "k_proj" not in name)
        if heads is not None:
            other = tensors.interleave_pairs(weight, heads)
            assert torch.equal(tensors.separate_pairs(other, heads), weight)


@each_relative
@torch.no_grad()
def test_cached_decoding_equals_the_full_forward_pass(shape: LlamaConfig) -> None:
    """From within the original context of 64 across its end, and from beyond."""
    model = make_model(shape)
    for each in answer(model, prompts(5, 50, 100, 300)):
        tokens = torch.tensor([each.prompt + each.tokens])
        full = model(tokens[:, :-1], targets_BT=tokens[:, 1:])[0]
        assert each.logprobs == pytest.approx(full[len(each.prompt) - 1 :].tolist(), abs=2e-5)


@each_relative
def test_a_batch_is_what_its_rows_are_alone(shape: LlamaConfig) -> None:
    model, asked = make_model(shape), prompts(5, 50, 100, 300)
    together = answer(model, asked)
    apart = [answer(model, [prompt], slots=1)[0] for prompt in asked]
    # a sample depends on its place among the prompts
    assert_same(together[:1], apart[:1])
    assert_same(together, answer(model, asked, slots=2))


@each_relative
@torch.no_grad()
def test_what_follows_a_token_changes_nothing(shape: LlamaConfig) -> None:
    model = make_model(shape)
    tokens = torch.tensor(prompts(200))
    assert (model(tokens)[:, :90] - model(tokens[:, :90])).abs().max() < 1e-5


@needs_compiler
@each_relative
def test_kernels_on_and_off_decode_alike(
    monkeypatch: pytest.MonkeyPatch, shape: LlamaConfig
) -> None:
    model, asked = make_model(shape), prompts(5, 50, 100)
    own = answer(model, asked)
    frozen = model.requires_grad_(False)
    assert (
        cpu_decoder.supports(frozen) == shapes.takes_decoding(shape) == (not shape.attention_bias)
    )
    monkeypatch.setattr(cpu_decoder, "supports", lambda model: False)
    monkeypatch.setattr(fused, "supports", lambda x: False)
    assert_same(own, answer(make_model(shape), asked))


@needs_compiler
@each_relative
@pytest.mark.parametrize("packed", [False, True])
def test_kernels_on_and_off_train_alike(
    monkeypatch: pytest.MonkeyPatch, shape: LlamaConfig, packed: bool
) -> None:
    torch.manual_seed(0)
    tokens = torch.randint(0, 96, (3, fused.BLOCK + 45))
    batch = {"tokens_BT": tokens, "targets_BT": tokens.roll(-1, 1)}
    if packed:
        batch["documents_BT"] = (torch.rand(tokens.shape) < 0.03).cumsum(1)

    assert fused.supports(torch.zeros(1))
    own = measure(make_model(shape), batch)
    monkeypatch.setattr(fused, "supports", lambda x: False)

    for found, expected in zip(own, measure(make_model(shape), batch), strict=True):
        assert (found - expected).norm() <= 5e-5 * expected.norm()


def measure(model: Llama, batch: dict[str, Tensor]) -> list[Tensor]:
    """Log-probabilities, and the gradient of every parameter."""
    logp_BT = model(**batch)
    logp_BT.sum().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    return [logp_BT.detach(), *(gradient for gradient in gradients if gradient is not None)]


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_fewer_bits_are_as_near_to_fp32_as_without_a_variation(precision: WeightPrecision) -> None:
    def gap(shape: LlamaConfig) -> float:
        model, asked = make_model(shape), prompts(40, 90)
        few = answer(model, asked, precision=precision)
        rows = [torch.tensor([each.prompt + each.tokens]) for each in few]
        gaps = []
        for each, row in zip(few, rows):
            with torch.no_grad():
                exact = model(row[:, :-1], targets_BT=row[:, 1:])[0, len(each.prompt) - 1 :]

            gaps.append(exact - torch.tensor(each.logprobs))

        return float(torch.cat(gaps).abs().mean())

    plain = gap(PLAIN)
    for name in ("wide heads", "narrow heads", "yarn", "bias", "mixed"):
        assert 0 < gap(RELATIVES[name]) < 3 * plain, name


def test_one_shape_has_one_description() -> None:
    assert replace(PLAIN, head_dim=16) == PLAIN
    assert replace(PLAIN, head_dim=0) == PLAIN
