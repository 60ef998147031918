"""Answers that share the tokens of their prompt are computed as each alone behind it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llama2 import devices
from llama2.devices import Precision
from llama2.kernels import fused, install
from llama2.model import llama
from llama2.model.llama import LlamaConfig
from llama2.model.positions import branch_gaps, positions_along, same_branch
from llama2.model.scorer import Scorer

PROMPTS, ANSWERS = (37, 130, 5), ((60, 71, 3), (9, 40, 44), (1, 2, 90))


def make_batch() -> tuple[dict[str, Tensor], list[list[int]]]:
    """Three rows of a prompt with three answers each, and the same as nine rows of one answer."""
    generator = torch.Generator().manual_seed(1)
    sizes = [prompt + sum(answers) for prompt, answers in zip(PROMPTS, ANSWERS, strict=True)]
    tokens_BT = torch.randint(1, 71, (3, max(sizes)), generator=generator)
    branches_BT = torch.full_like(tokens_BT, 4)  # what pads a row is one more
    ends_BK = torch.zeros(3, 3, dtype=torch.long)
    alone = []

    for row, (prompt, answers) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        branches_BT[row, :prompt] = 0
        begin = prompt
        for number, answer in enumerate(answers):
            here = slice(begin, begin + answer)
            branches_BT[row, here] = number + 1
            ends_BK[row, number] = begin + answer - 1
            alone.append([*tokens_BT[row, :prompt].tolist(), *tokens_BT[row, here].tolist()])
            begin += answer

    return {"tokens_BT": tokens_BT, "branches_BT": branches_BT, "ends_BK": ends_BK}, alone


def differentiate(model: Scorer, scores: Tensor) -> list[Tensor]:
    """Scores, and the gradients of a weighted sum of them."""
    model.zero_grad()
    (scores.flatten() * torch.linspace(-1, 1, scores.numel())).sum().backward()
    return [scores.detach().flatten(), *(each.grad.clone() for each in model.parameters())]


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 3e-5), ("bf16", 0.03)])
@pytest.mark.parametrize("way", ["kernels", "products", "sdpa"])
def test_shared_prompts_equal_answers_alone(
    monkeypatch: pytest.MonkeyPatch, precision: Precision, tolerance: float, way: str
) -> None:
    if way != "kernels":
        monkeypatch.setattr(fused, "supports", lambda x: False)
    elif not fused.supports(torch.zeros(1)):
        pytest.skip("no compiler")
    if way == "sdpa":
        monkeypatch.setattr(llama, "EXPLICIT_LENGTH", 0)

    model = install(Scorer(LlamaConfig(71, 48, 88, 2, 6, 2, 512), 3))
    batch, alone = make_batch()
    with devices.autocast(torch.device("cpu"), precision):
        shared = differentiate(model, model(**batch))

    lengths_B = torch.tensor(list(map(len, alone)))
    padded = [row + [0] * (int(lengths_B.max()) - len(row)) for row in alone]
    with devices.autocast(torch.device("cpu"), precision):
        apart = differentiate(model, model(torch.tensor(padded), lengths_B=lengths_B))

    for found, expected in zip(shared, apart, strict=True):
        assert (found - expected).norm() <= tolerance * expected.norm()


def test_an_answer_sees_its_prompt_and_itself() -> None:
    branches_BT = torch.tensor([[0, 0, 1, 1, 2, 2, 3]])
    assert positions_along(branches_BT).tolist() == [[0, 1, 2, 3, 2, 3, 2]]
    assert branch_gaps(branches_BT)[0, 5].tolist() == [2, 4]
    assert same_branch(branches_BT)[0, 5].tolist() == [True, True, False, False, True, True, False]
    assert same_branch(branches_BT)[0, 1].tolist() == [True, True, *[False] * 5]
