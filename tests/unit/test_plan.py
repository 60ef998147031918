"""Dry runs: the paper's sizes from their recipes alone, and estimates checked against what really
is kept."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from llama2 import config
from llama2.config import layers as recipes
from llama2.errors import UserError
from llama2.formats.checkpoint import make_config_json
from llama2.kernels import fused, install
from llama2.model.llama import Llama, LlamaConfig
from llama2.model.scorer import Scorer
from llama2.model.sizes import SIZES
from llama2.recipe import launch, pipeline
from llama2.records import dump
from llama2.stages import evaluate, ppo, pretrain, reward, select, sft
from llama2.stages.common.answers import load_judge
from llama2.stages.common.memory import Tower, flops_per_token, layer_bytes, scorer_bytes
from llama2.stages.common.planning import Cluster, PlannedRuns
from llama2.stages.common.training import freeze_lower
from llama2.train.objectives import next_token

RECIPES = Path(__file__).parents[2] / "recipes"
PARAMETERS = {
    "7b": 6_738_415_616,
    "13b": 13_015_864_320,
    "34b": 33_743_970_304,
    "70b": 68_976_648_192,
}
GPU_HOURS = {"7b": 184_320, "13b": 368_640, "34b": 1_038_336, "70b": 1_720_320}  # Table 2


def planned(*arguments: str, **cluster: float) -> dict[str, Any]:
    recipe = config.parse(pipeline.Config, [str(part) for part in arguments], "llama2 run")
    return pipeline.plan(recipe, Cluster(**cluster), PlannedRuns())


@pytest.fixture(scope="module", params=PARAMETERS)
def paper(request):
    begin = time.process_time()
    found = planned(RECIPES / request.param / "recipe.yaml", ranks=64)
    assert time.process_time() - begin < 5

    return request.param, found


def test_the_papers_recipes_say_what_they_would_train(paper):
    size, found = paper
    plan, steps = found["plan"], found["steps"]
    assert plan["pretrain"]["parameters"] == PARAMETERS[size]
    assert plan["pretrain"]["tokens_per_step"] == 4_194_304
    assert plan["pretrain"]["tokens"] == pytest.approx(2e12, rel=1e-4)
    assert (
        plan["pretrain"]["steps"] * plan["pretrain"]["tokens_per_step"]
        == plan["pretrain"]["tokens"]
    )
    assert plan["pretrain"]["gpu_hours"] == pytest.approx(GPU_HOURS[size], rel=0.15)
    trained = [
        name for name, one in plan.items() if one["verb"] in ("pretrain", "sft", "reward", "ppo")
    ]
    assert len(trained) == 1 + 1 + 11 + 5 + 1

    for name in trained:
        assert plan[name]["parameters"] > 0.9 * PARAMETERS[size], name
        assert plan[name]["memory_per_rank_gib"]["together"] > 0, name

    large = size in ("34b", "70b")
    assert steps["pretrain"]["training"]["optimizer"]["learning_rate"] == (
        1.5e-4 if large else 3e-4
    )
    assert steps["v5_ppo"]["beta"] == (0.005 if large else 0.01)
    assert steps["v5_ppo"]["critic_learning_rate"] == (5e-6 if size == "70b" else 9e-6)
    rates = {
        steps[name]["training"]["optimizer"]["learning_rate"]
        for name in steps
        if plan[name]["verb"] == "reward"
    }
    assert rates == {5e-6 if size == "70b" else 1e-5}
    assert plan["v5_ppo"]["steps"] == 3200
    assert (SIZES[size].num_key_value_heads == 8) == large


def test_versions_follow_the_papers_order():
    found = planned(RECIPES / "70b" / "recipe.yaml")
    names = list(found["plan"])
    assert [name for name in names if found["plan"][name]["verb"] == "ppo"] == ["v5_ppo"]
    assert names.index("v3") < names.index("ghost") < names.index("v4_candidate")
    assert "ghost" not in found["plan"]["v3_candidate"]["needs"]
    assert [len(found["steps"][f"rejection{version}"]["earlier"]) for version in range(1, 6)] == [
        0,
        0,
        0,
        3,
        4,
    ]


def test_a_third_reward_model_guards_against_what_the_two_were_fooled_into():
    """It learns from open data alone, no step optimises it, and PPO is stopped and chosen by it."""
    found = planned(RECIPES / "13b" / "recipe.yaml")
    steps, plan = found["steps"], found["plan"]
    general = "runs/13b/general"
    assert [one["path"] for one in steps["general"]["preferences"].values()] == [
        "runs/13b/open/preferences.jsonl"
    ]
    assert [one["path"] for one in steps["general"]["heldout"].values()] == [
        "runs/13b/open/heldout-preferences.jsonl"
    ]
    assert steps["open"]["heldout"] > 0
    judged = {
        name: [
            key for key in ("rewards", "judge") if (step.get(key) or {}).get("helpful") == general
        ]
        for name, step in steps.items()
    }
    assert {name: keys for name, keys in judged.items() if keys} == {
        "v5_ppo": ["judge"],
        "v5": ["rewards"],
    }
    assert "general" in plan["v5_ppo"]["needs"]


@pytest.mark.parametrize("size", ["7b", "13b", "34b"])
def test_smaller_sizes_learn_from_samples_of_the_largest(size):
    """And from their own with one recipe more, which changes nothing else. Neither needs a run of
    70B to be planned."""
    given, own = (
        planned(RECIPES / size / "recipe.yaml"),
        planned(RECIPES / size / "recipe.yaml", RECIPES / "own-samples.yaml"),
    )
    rounds = {f"rejection{version}" for version in range(1, 6)}
    assert own["steps"].keys() - given["steps"].keys() == rounds

    for name, step in given["steps"].items():
        if not name.endswith("_candidate"):
            assert step == own["steps"][name]
            continue

        paths = [found["steps"][name]["dialogs"].pop("rejection")["path"] for found in (given, own)]
        assert paths == [
            f"runs/70b/rejection{name[1]}/pool.jsonl",
            f"runs/{size}/rejection{name[1]}/pool.jsonl",
        ]
        assert step == own["steps"][name]


def test_other_recipes_lie_upon_one_of_the_paper():
    released = planned(
        RECIPES / "7b" / "recipe.yaml",
        RECIPES / "released.yaml",
        "--parameters.pretrain",
        "weights",
    )
    assert "pretrain" not in released["plan"]
    assert released["steps"]["sft"]["model"] == "weights"
    assert "exists" in released["plan"]["sft"]["parameters"]


def test_a_step_cannot_also_be_a_parameter():
    with pytest.raises(
        UserError, match=r"'sft' is both a step and a parameter; .*--steps\.sft null"
    ):
        planned(RECIPES / "7b" / "recipe.yaml", "--parameters.sft", "elsewhere")


def test_a_recipe_extends_another_and_not_itself(tmp_path):
    (tmp_path / "base.yaml").write_text(
        "out: a\nsteps: {w: {verb: world, scale: 0.5, seconds: 9}, x: {verb: world}}\n"
    )
    (tmp_path / "over.yaml").write_text(
        "extends: base.yaml\nout: b\nsteps: {w: {scale: 0.1}, x: null}\n"
    )
    recipe = config.parse(pipeline.Config, [str(tmp_path / "over.yaml")], "llama2 run")
    (step,) = pipeline.resolve_steps(recipe).values()
    assert (step.out, step.keys.seconds, step.values["scale"]) == (Path("b/w"), 9, 0.1)
    (tmp_path / "base.yaml").write_text("extends: over.yaml\n")

    with pytest.raises(UserError, match="extends itself"):
        recipes.read_layers(tmp_path / "over.yaml")


def test_the_tokenizers_vocabulary_decides_the_size(tmp_path):
    (tmp_path / "recipe.yaml").write_text(
        yaml.safe_dump(
            {
                "out": "x",
                "steps": {
                    "words": {"verb": "tokenizer", "documents": ["text"], "vocab_size": 5000},
                    "shards": {"verb": "tokenize", "documents": "text", "tokenizer": "${words}"},
                    "base": {"verb": "pretrain", "shards": "${shards}", "size": "tiny"},
                },
            },
            sort_keys=False,
        )
    )
    assert (
        planned(tmp_path / "recipe.yaml")["plan"]["base"]["parameters"]
        == pretrain.architecture(pretrain.Config(out="x", shards="y"), 5000).parameters()
    )


def test_a_checkpoint_that_exists_needs_no_recipe(tmp_path):
    (tmp_path / "config.json").write_text(dump(make_config_json(SIZES["7b"])))
    one = sft.Config(out="x", model=tmp_path, dialogs={"a": {"path": "b"}})
    assert sft.plan(one, Cluster(), PlannedRuns())["parameters"] == PARAMETERS["7b"]


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_counted_exactly(tied):
    shape = LlamaConfig(96, 32, 64, 3, 4, 2, tie_word_embeddings=tied)
    for tower, model in ((Tower(shape), Llama(shape)), (Tower(shape, scalar=True), Scorer(shape))):
        assert tower.parameters == sum(parameter.numel() for parameter in model.parameters())
        assert tower.block == sum(
            parameter.numel() for parameter in model.model.layers[0].parameters()
        )
        assert tower.root + 3 * tower.block == tower.parameters


@pytest.mark.parametrize(("precision", "kv_heads"), [("bf16", 8), ("bf16", 2), ("fp32", 8)])
def test_a_layer_keeps_what_the_plan_counts(monkeypatch, precision, kv_heads):
    monkeypatch.setattr(fused, "supports", lambda x: False)  # plans are made for GPUs
    layers, rows, length = 4, 2, 544  # above 512 queries attention is fused, as on a GPU
    shape = LlamaConfig(64, 256, 704, layers, 8, kv_heads, 1024)
    model, tokens_BT = install(Llama(shape)), torch.zeros(rows, length, dtype=torch.long)
    matrices = {tuple(p.shape) for p in model.parameters() if p.dim() == 2}
    parameters = {p.data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}
    alive = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if (
            tensor.data_ptr() not in parameters
            and not {tuple(tensor.shape), tuple(tensor.shape[::-1])} & matrices
        ):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()

        alive.append(tensor)
        return tensor

    batch = {
        "tokens_BT": tokens_BT,
        "targets_BT": tokens_BT,
        "weights_BT": torch.ones(rows, length),
    }
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"),
    ):
        next_token(model, batch)

    size = 2 if precision == "bf16" else 4
    ends = (4 + size) * 256 + size * 64  # the last norm and the logits
    assert sum(kept.values()) == pytest.approx(
        rows * length * (layers * layer_bytes(shape, size, 4) + ends), rel=0.03
    )


@pytest.mark.parametrize("tied", [True, False])
def test_frozen_layers_have_neither_moments_nor_a_backward_pass(tied):
    shape = LlamaConfig(100, 32, 64, 4, 4, 2, tie_word_embeddings=tied)
    model = Llama(shape)
    freeze_lower(model.model, 3)
    trained = sum(each.numel() for each in model.parameters() if each.requires_grad)
    assert Tower(shape).count_trained(3) == trained
    assert Tower(shape).count_trained(0) == shape.parameters()

    frozen = sum(each.numel() for each in model.model.layers[:3].parameters())
    saved = flops_per_token(shape, 10) - flops_per_token(shape, 10, frozen_layers=3)
    assert saved == 4 * (frozen + 3 * 32 * 10)


def test_the_fewest_ranks_are_the_fewest():
    config = reward.Config(
        out="x",
        model="m",
        preferences={"a": {"path": "b"}},
        training={"parallel": "shard", "gradient_checkpointing": True},
    )
    lineage = PlannedRuns({Path("m"): SIZES["13b"]})

    def plan(ranks: int) -> dict[str, Any]:
        return reward.plan(config, Cluster(ranks=ranks, gib=141), lineage)

    fewest = plan(1)["fewest_ranks"]
    assert fewest > 1
    assert plan(fewest)["fits_141_gib"]
    assert not plan(fewest - 1)["fits_141_gib"]


def test_the_fewest_ranks_of_ppo_do_not_depend_on_the_ranks_asked_about():
    """The reference is spread too. What 80 GiB cannot hold on 11 ranks, 12 can."""
    found = {
        ranks: planned(RECIPES / "7b" / "recipe.yaml", ranks=ranks)["plan"]["v5_ppo"]
        for ranks in (8, 11, 12, 64)
    }
    (fewest,) = {plan["fewest_ranks"] for plan in found.values()}
    assert fewest == 12
    assert [ranks for ranks, plan in found.items() if plan["fits_80_gib"]] == [12, 64]
    per_rank = 4 * PARAMETERS["7b"] / 2**30

    for ranks, plan in found.items():
        assert plan["memory_per_rank_gib"]["reference"] == pytest.approx(per_rank / ranks, rel=0.01)


def test_the_judge_of_ppo_takes_the_place_of_the_reward_models():
    shapes = {Path(name): SIZES["7b"] for name in ("p", "h", "s")} | {Path("large"): SIZES["70b"]}

    def whole(judge: dict[str, Path] | None) -> float:
        config = ppo.Config(
            out="x", policy="p", rewards={"helpful": "h", "safe": "s"}, prompts="q", judge=judge
        )
        return ppo.plan(config, Cluster(), PlannedRuns(dict(shapes)))["memory_per_rank_gib"][
            "whole_models"
        ]

    assert whole({"helpful": "h"}) == whole(None)
    large, small = (Tower(SIZES[size], scalar=True).parameters for size in ("70b", "7b"))
    assert whole({"helpful": "large"}) - whole(None) == pytest.approx(
        2 * (large - 2 * small) / 2**30, rel=0.01
    )


def test_judging_needs_the_largest_model_not_their_sum():
    lineage = PlannedRuns({Path(name): SIZES["7b"] for name in ("a", "b", "h", "s")})
    judges = {"helpful": "h", "safe": "s"}
    one = evaluate.Config(out="x", versions={"A": "a", "B": "b"}, prompts="p", rewards=judges)
    other = select.Config(
        out="x",
        candidate="b",
        predecessor="a",
        prompts="p",
        rewards=judges,
        sample={"max_tokens": 256, "slots": 128},
    )

    for found in (evaluate.plan(one, Cluster(), lineage), select.plan(other, Cluster(), lineage)):
        memory = found["memory_per_rank_gib"]
        weights = 2 * PARAMETERS["7b"] / 2**30
        assert memory["version"]["weights"] == pytest.approx(weights, rel=1e-2)
        assert memory["version"]["cache"] == pytest.approx(
            128 * 512 * 2 * 32 * 4096 * 2 / 2**30, rel=1e-2
        )
        # matrices in bf16, embeddings in fp32
        judge = 2 * 6_607_077_376 - 4096 * 32000 * 2 + 4 * 32000 * 4096
        assert memory["judge"]["weights"] == pytest.approx(judge / 2**30, rel=1e-2)
        assert memory["together"] == pytest.approx(sum(memory["version"].values()), rel=1e-2)
        assert found["fits_80_gib"]

    whole = evaluate.plan(one.model_copy(update={"ghost": Path("g")}), Cluster(), lineage)
    cache = whole["memory_per_rank_gib"]["version"]["cache"]
    # dialogs fill the context
    assert cache == pytest.approx(128 * 4096 * 2 * 32 * 4096 * 2 / 2**30, rel=1e-2)
    assert not whole["fits_80_gib"]


def test_reward_models_are_planned_as_they_are_loaded(tmp_path, scorers):
    for precision in ("bf16", "fp32"):
        judge = load_judge(scorers[0], precision, torch.device("cpu"))
        alive = sum(
            parameter.numel() * parameter.element_size() for parameter in judge.parameters()
        )
        assert scorer_bytes([judge.config], precision) == alive


def test_a_recipe_has_a_total():
    found = planned(RECIPES / "7b" / "recipe.yaml", ranks=64)
    assert found["total"]["gpu_hours"] == pytest.approx(
        found["plan"]["pretrain"]["gpu_hours"], rel=0.2
    )
    assert "distill" in found["total"]["gpu_hours_unknown_of"]
    seventy = planned(RECIPES / "70b" / "recipe.yaml", ranks=64)["total"]["do_not_fit"]
    assert {"rejection1", "v5_ppo"} <= set(seventy)
    assert "pretrain" not in seventy


def test_what_every_rank_holds_whole_no_number_of_ranks_helps():
    found = planned(RECIPES / "70b" / "recipe.yaml")["plan"]
    assert str(found["rejection1"]["fewest_ranks"]).startswith("none")
    assert str(found["v5_ppo"]["fewest_ranks"]).startswith("none")


def test_flops_of_the_paper():
    assert flops_per_token(SIZES["7b"], 4096) == pytest.approx(
        6 * 6.607e9 + 6 * 32 * 4096 * 4096, rel=1e-3
    )


@pytest.mark.parametrize("tied", [False, True])
def test_flops_are_those_of_the_matrices_a_token_is_multiplied_with(tied):
    shape = LlamaConfig(96, 32, 64, 3, 4, 2, tie_word_embeddings=tied)
    layers = sum(parameter.numel() for parameter in Llama(shape).model.layers.parameters()) + 32
    assert flops_per_token(shape, 10) == 6 * (layers + 96 * 32 + 3 * 32 * 10)
    # no head over the vocabulary
    assert flops_per_token(shape, 10, scalar=True) == 6 * (layers + 3 * 32 * 10)


def test_the_command_line_takes_the_machines(capsys):
    recipe = str(RECIPES / "13b" / "recipe.yaml")
    launch.run_command(
        "run", [recipe, "--dry-run", "--ranks", "256", "--gib=40", "--mfu", "0.5", "--seed", "3"]
    )
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["cluster"] == {"ranks": 256, "gib": 40.0, "tflops": 312.0, "mfu": 0.5}
    assert shown["steps"]["pretrain"]["seed"] == config.derive_seed(3, "pretrain")
    assert shown["plan"]["pretrain"]["ranks"] == 256

    with pytest.raises(UserError, match="'--ranks': must be greater than 0"):
        launch.run_command("run", [recipe, "--dry-run", "--ranks", "0"])
