"""Draws follow the distribution they promise, and depend on nothing but what names them."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from llama2.errors import UserError
from llama2.generate import sampling as sampling_module
from llama2.generate.sampling import Sampling, draw, draw_uniforms

LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -6.0, 1.5, -30.0])
MANY = 40_000


def frequencies(sampling: Sampling, logits_V: torch.Tensor = LOGITS) -> torch.Tensor:
    numbers = torch.from_numpy(
        draw_uniforms([(sampling.seed, index, 0) for index in range(MANY)], 1)[:, 0]
    )
    tokens, _ = draw(logits_V.expand(MANY, -1), numbers, sampling)
    return torch.bincount(tokens, minlength=len(logits_V)) / MANY


def nucleus(probabilities: torch.Tensor, top_p: float) -> torch.Tensor:
    """By the book: take tokens, likeliest first, until their mass exceeds p."""
    kept, mass = torch.zeros_like(probabilities), 0.0
    for token in probabilities.argsort(descending=True).tolist():
        kept[token] = probabilities[token]
        mass += float(probabilities[token])
        if mass > top_p:
            break

    return kept / kept.sum()


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert ((found == 0) | (expected > 0)).all(), "a token outside of the support"
    deviation = (expected * (1 - expected) / MANY).sqrt()
    assert ((found - expected).abs() <= 4.5 * deviation + 1e-9).all()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature(temperature: float) -> None:
    assert_close(frequencies(Sampling(temperature)), (LOGITS / temperature).softmax(0))


@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.6, 0.9, 0.999])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_top_p(top_p: float, temperature: float) -> None:
    expected = nucleus((LOGITS / temperature).softmax(0), top_p)
    assert_close(frequencies(Sampling(temperature, top_p)), expected)


def test_top_p_where_the_nucleus_is_wider_than_the_first_candidates() -> None:
    logits = torch.linspace(0, -1, 700)
    assert_close(frequencies(Sampling(1.0, 0.8), logits), nucleus(logits.softmax(0), 0.8))


@pytest.mark.parametrize("top_k", [1, 3, 8, 100])
def test_top_k_then_top_p(top_k: int) -> None:
    likeliest = LOGITS.topk(min(top_k, 8)).indices
    kept = torch.full_like(LOGITS, -math.inf).index_copy(0, likeliest, LOGITS[likeliest]).softmax(0)
    assert_close(frequencies(Sampling(top_k=top_k)), kept)
    assert_close(frequencies(Sampling(top_k=top_k, top_p=0.7)), nucleus(kept, 0.7))


def test_equally_likely_tokens_are_kept_together() -> None:
    assert_close(frequencies(Sampling(top_p=0.3), torch.zeros(4)), torch.full((4,), 0.25))


@pytest.mark.parametrize("size", [32, 100, 1024])
def test_greedy_takes_the_first_of_the_likeliest(size: int) -> None:
    logits = torch.randint(0, 9, (200, size), generator=torch.Generator().manual_seed(0)).float()
    tokens, _ = draw(logits, torch.zeros(200, 2), Sampling(temperature=0))
    assert tokens.tolist() == logits.argmax(-1).tolist()


@pytest.mark.parametrize(
    "sampling", [Sampling(0.0), Sampling(0.5), Sampling(1.0, 0.5), Sampling(top_k=2)]
)
def test_logprobs_are_those_of_the_untouched_model(sampling: Sampling) -> None:
    numbers = torch.from_numpy(draw_uniforms([(0, index, 0) for index in range(50)], 1)[:, 0])
    tokens, logprobs = draw(LOGITS.expand(50, -1), numbers, sampling)
    torch.testing.assert_close(logprobs, LOGITS.log_softmax(0)[tokens], atol=1e-6, rtol=0)


@pytest.mark.parametrize("uniform", [0.0, 1 - 2.0**-24])
def test_the_ends_of_the_interval_draw_possible_tokens(uniform: float) -> None:
    logits = torch.full((1, 64), -math.inf)
    logits[0, 10:20] = 0.0
    tokens, _ = draw(logits, torch.full((1, 2), uniform), Sampling())
    assert 10 <= int(tokens) < 20


@pytest.mark.skipif(not sampling_module._call.is_built, reason="no C++ compiler")
@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(0.6), Sampling(1.3, 0.9), Sampling(0.0), Sampling(0.8, 0.3)]
)
@pytest.mark.parametrize("changed", [False, True])
def test_native_draws_are_those_of_pytorch(
    sampling: Sampling, changed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(400, 1500, generator=generator)
    numbers = torch.rand(400, 2, generator=generator)
    source = (
        torch.where(torch.rand(400, 1500, generator=generator) < 0.5, -math.inf, logits + 1)
        if changed
        else None
    )
    tokens, logprobs = draw(logits, numbers, sampling, source)
    monkeypatch.setattr(sampling_module, "_call", SimpleNamespace(is_built=False))
    expected, theirs = draw(logits, numbers, sampling, source)
    same = tokens == expected
    assert same.float().mean() >= 0.99, (
        "sums rounded otherwise may move a draw to its neighbour, rarely"
    )
    torch.testing.assert_close(logprobs[same], theirs[same], atol=2e-5, rtol=0)


def test_uniforms_are_named_by_seed_prompt_sample_and_place() -> None:
    streams = [(5, 3, 1), (5, 0, 0), (5, 1, 3), (5, 3, 0), (5, 0, 3)]
    together = draw_uniforms(streams, 40)
    for row, stream in enumerate(streams):
        assert (draw_uniforms([stream], 12)[0] == together[row, :12]).all()

    others = [(seed, prompt, sample) for seed in (6, -1) for _, prompt, sample in streams]
    several = np.concatenate([together.ravel(), draw_uniforms(others, 40).ravel()])
    assert len(np.unique(several)) > 0.999 * several.size
    assert several.min() >= 0
    assert several.max() < 1


def test_uniforms_are_uniform_and_independent() -> None:
    streams = [(0, index, sample) for index in range(100) for sample in range(20)]
    numbers = draw_uniforms(streams, 50).reshape(-1, 100)
    counts = np.histogram(numbers, 64, (0, 1))[0]
    expected = numbers.size / 64
    assert abs(((counts - expected) ** 2 / expected).sum() - 63) < 5 * math.sqrt(2 * 63)
    bound = 5 / math.sqrt(numbers.size)
    assert abs(np.corrcoef(numbers[:, :-1].ravel(), numbers[:, 1:].ravel())[0, 1]) < bound, "places"
    assert abs(np.corrcoef(numbers[:-1].ravel(), numbers[1:].ravel())[0, 1]) < bound, "samples"
    assert abs(np.corrcoef(numbers[:-20].ravel(), numbers[20:].ravel())[0, 1]) < bound, "prompts"


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -1.0},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_k": -1},
        {"max_tokens": 0},
        {"n": 0},
    ],
)
def test_impossible_settings_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(UserError, match=next(iter(bad))):
        Sampling(**bad)  # type: ignore[arg-type]
