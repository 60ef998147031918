"""The learning rate and the decay groups of §2.2."""

import math

import pytest
import torch
from torch import nn

from llama2.errors import UserError
from llama2.train import optim
from llama2.train.loop import Plan


def test_schedule_values():
    plan = Plan(max_steps=110, warmup_steps=10)
    assert plan.scale_rate(0) == pytest.approx(0.1)
    assert plan.scale_rate(9) == 1.0
    assert plan.scale_rate(59) == pytest.approx(0.1 + 0.9 * 0.5)  # half of the cosine
    assert plan.scale_rate(109) == pytest.approx(0.1)
    assert plan.scale_rate(500) == pytest.approx(0.1)
    assert all(plan.scale_rate(s) > plan.scale_rate(s + 1) for s in range(9, 109))


def test_without_warmup_the_first_update_has_the_peak():
    plan = Plan(max_steps=5)
    assert [plan.scale_rate(s) for s in range(5)] == pytest.approx(
        [0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done / 4)) for done in range(5)]
    )
    assert Plan(max_steps=1).scale_rate(0) == 1.0  # a single update has nothing to decay from
    assert [Plan(max_steps=2).scale_rate(s) for s in range(2)] == pytest.approx([1.0, 0.1])
    assert Plan(max_steps=2, warmup_steps=1).scale_rate(0) == 1.0
    assert Plan(max_steps=6, warmup_steps=5).scale_rate(4) == 1.0


@pytest.mark.parametrize("key", ["max_steps", "total_steps"])
def test_no_steps_at_all_are_refused(key):
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        Plan(**{key: 0})


def test_constant_schedule_needs_no_length():
    plan = Plan(schedule="constant", warmup_steps=2)
    plan.check()
    assert [plan.scale_rate(s) for s in range(4)] == [0.5, 1.0, 1.0, 1.0]


def test_plans_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="max_steps"):
        Plan().check()

    with pytest.raises(
        UserError, match="warmup_steps 2000 leaves nothing of a schedule of 700 steps"
    ):
        Plan(max_steps=700, warmup_steps=2000).check()


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.actor = nn.ModuleDict({"embed": nn.Embedding(5, 4), "norm": nn.LayerNorm(4)})
        self.critic = nn.Linear(4, 1)


def test_matrices_decay_and_vectors_do_not():
    model = Towers()
    model.critic.bias.requires_grad_(False)
    groups = optim.group_parameters(model, optim.AdamW(), {"critic.": 1e-3})
    names = {id(p): n for n, p in model.named_parameters()}
    found = {(names[id(p)], g["peak"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert found == {
        ("actor.embed.weight", 3e-4, 0.1),
        ("actor.norm.weight", 3e-4, 0.0),
        ("actor.norm.bias", 3e-4, 0.0),
        ("critic.weight", 1e-3, 0.1),
    }


def test_tied_weights_count_once():
    model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "head": nn.Linear(4, 5, bias=False)})
    model["head"].weight = model["embed"].weight
    assert sum(len(g["params"]) for g in optim.group_parameters(model, optim.AdamW())) == 1


def test_a_rate_for_no_parameter_is_a_defect():
    with pytest.raises(ValueError, match="critics"):
        optim.group_parameters(Towers(), optim.AdamW(), {"critics.": 1e-3})


def test_update_is_adamw_by_hand():
    model = nn.Linear(2, 1, bias=False)
    settings = optim.AdamW(learning_rate=0.01)
    before = model.weight.detach().clone()
    optimizer = optim.build_adamw(model, settings)
    model.weight.grad = torch.tensor([[0.3, -0.2]])
    optimizer.step()
    # after one step both bias-corrected moments are the gradient and its square
    expected = before * (1 - 0.01 * 0.1) - 0.01 * model.weight.grad / (
        model.weight.grad.abs() + 1e-5
    )
    torch.testing.assert_close(model.weight.detach(), expected, rtol=1e-6, atol=1e-7)
    assert optimizer.defaults["betas"] == (0.9, 0.95)
    assert math.isclose(optimizer.defaults["eps"], 1e-5)


def test_parts_are_named_by_prefix_and_the_rest_is_one_more():
    model = Towers()
    model.critic.bias.requires_grad_(False)
    names = {id(p): n for n, p in model.named_parameters()}
    found = {
        part: [names[id(p)] for p in parameters]
        for part, parameters in optim.split_parameters(model, ["critic."]).items()
    }
    assert found == {
        "critic.": ["critic.weight"],
        "": ["actor.embed.weight", "actor.norm.weight", "actor.norm.bias"],
    }
    assert [*optim.split_parameters(model, ())] == [""]
    # nothing is left over
    assert [*optim.split_parameters(model, ("actor.", "critic."))] == ["actor.", "critic."]

    with pytest.raises(ValueError, match="no parameter starts with"):
        optim.split_parameters(model, ("value.",))
