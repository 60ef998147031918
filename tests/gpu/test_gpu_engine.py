"""The engine on a GPU: what it draws is the model's, alone or in company, and the same seed draws
the same. Steps that are launched as graphs: `test_gpu_graphs.py`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from shapes import VOCABULARY, build

from llama2.generate.engine import Engine
from llama2.generate.generator import Completion
from llama2.generate.request import SampleRequest
from llama2.generate.sampling import Sampling
from llama2.generate.score import compute_logprobs, predict_tokens, score_rows
from llama2.model.llama import Llama
from llama2.model.scorer import Scorer

GREEDY = Sampling(temperature=0, max_tokens=24)
DRAWN = Sampling(max_tokens=24, seed=5)


@pytest.fixture(params=[4, 2], ids=["mha", "gqa"])
def model(request, device) -> Llama:
    return build(request.param).to(device).requires_grad_(False).eval()


def prompts(count: int = 11) -> list[list[int]]:
    random = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 70, (count,), generator=random).tolist()
    return [
        torch.randint(3, VOCABULARY, (length,), generator=random).tolist() for length in lengths
    ]


def flat(answers: list[list[Completion]]) -> list[Completion]:
    return [one for row in answers for one in row]


def test_greedy_answers_are_the_full_forward_passs(model) -> None:
    """Each token is the likeliest of a forward pass without cache, or as likely but for
    rounding."""
    for one in flat(Engine(model, slots=4, precision="fp32").generate(prompts(), GREEDY)):
        row = torch.tensor([[*one.prompt, *one.tokens]], device=model.head_weight.device)
        logits = model(row[:, :-1])[0, len(one.prompt) - 1 :]
        chosen = logits.gather(1, row[0, len(one.prompt) :, None])[:, 0]
        assert (logits.amax(-1) - chosen).max() < 1e-3


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-3), ("bf16", 0.3)])
def test_log_probabilities_are_the_trainers(model, record_property, precision, tolerance) -> None:
    answers = flat(Engine(model, slots=4, precision=precision).generate(prompts(), DRAWN))
    full = compute_logprobs(model, [[*one.prompt, *one.tokens] for one in answers], precision)
    gaps = torch.cat(
        [
            torch.tensor(one.logprobs) - torch.tensor(row[len(one.prompt) - 1 :])
            for one, row in zip(answers, full)
        ]
    ).abs()
    record_property("gap, mean and largest, nats", f"{gaps.mean():.1e} {gaps.max():.1e}")
    assert gaps.mean() < tolerance / 10
    assert gaps.max() < tolerance


def test_the_seed_decides(model) -> None:
    engine = Engine(model, slots=4, precision="bf16")
    first = engine.generate(prompts(), DRAWN)
    assert engine.generate(prompts(), DRAWN) == first
    assert engine.generate(prompts(), replace(DRAWN, seed=6)) != first


@pytest.mark.parametrize(
    "sampling",
    [
        DRAWN,
        replace(DRAWN, top_p=0.8, temperature=1.2),
        replace(DRAWN, top_k=5),
        replace(DRAWN, min_p=0.05),
        replace(
            DRAWN,
            repetition_penalty=1.3,
            presence_penalty=0.2,
            frequency_penalty=0.1,
            logit_bias=((7, 2.0),),
        ),
        replace(DRAWN, stop=tuple(range(3, 60)), n=3),
    ],
    ids=["plain", "nucleus", "top_k", "min_p", "penalties", "stops"],
)
def test_samples_are_those_of_the_cpu(model, device, record_property, sampling) -> None:
    """In fp32, but where a random number falls between two roundings, after which an answer goes
    another way."""
    here = flat(Engine(model, slots=4, precision="fp32").generate(prompts(), sampling))
    there = flat(Engine(model.to("cpu"), slots=4, precision="fp32").generate(prompts(), sampling))
    model.to(device)
    same = sum(one.tokens == other.tokens for one, other in zip(here, there))
    record_property("answers alike", f"{same} of {len(there)}")
    assert same >= 0.8 * len(there)


def test_an_open_session_answers_as_a_batch_does(model, record_property) -> None:
    engine = Engine(model, slots=4, precision="fp32")
    expected = flat(engine.generate(prompts(), GREEDY))
    requests = [
        SampleRequest(tuple(prompt), GREEDY, index) for index, prompt in enumerate(prompts())
    ]
    session = engine.open()

    for request in requests:
        session.submit(request)

    while not session.idle:
        session.step()

    same = sum(tuple(request.tokens) == one.tokens for request, one in zip(requests, expected))
    record_property("answers alike", f"{same} of {len(expected)}")
    assert same >= 0.8 * len(expected)
    assert (
        tuple(engine.stream(prompts()[0], GREEDY))
        == engine.generate(prompts()[:1], GREEDY)[0][0].tokens
    )


def test_weights_that_are_trained_are_seen_at_once(device) -> None:
    model = build().to(device)
    engine = Engine(model, slots=4, precision="bf16")
    before = engine.generate(prompts(3), GREEDY)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5, fused=True)

    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)

    optimizer.step()
    assert engine.generate(prompts(3), GREEDY) != before


def test_scores_and_predictions_equal_the_cpus(model, device) -> None:
    scorer = Scorer(model.config, 2)
    with torch.no_grad():
        scorer.score.weight.mul_(30)

    rows = prompts()
    exact = score_rows(scorer, rows, "fp32")
    assert score_rows(scorer.to(device), rows, "fp32") == pytest.approx(exact, rel=1e-3, abs=1e-3)
    assert score_rows(scorer, rows, "bf16") == pytest.approx(exact, rel=0.1, abs=0.1)
    here = predict_tokens(model, rows, "fp32")
    there = predict_tokens(model.to("cpu"), rows, "fp32")
    model.to(device)

    for (mine, _), (theirs, _) in zip(here, there):
        assert mine == pytest.approx(theirs, abs=1e-3)
