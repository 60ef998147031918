"""PPO on two ranks is PPO on one: the critic's scale, the clipping of each tower, and what becomes
of the weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from test_ranks import together

from llama2.formats import checkpoint
from llama2.generate.dialogue import Chat
from llama2.generate.engine import Engine
from llama2.generate.rewards import RewardModels
from llama2.ranks import Ranks
from llama2.stages.common.ppo_rollouts import ACTOR, CRITIC, ActorCritic, Rollouts, Settings
from llama2.stages.common.ppo_watch import Watch
from llama2.stages.common.sampling import Sample, load_rewards, read_prompts
from llama2.tokenizer.tokenizer import Tokenizer
from llama2.train import hooks, optim, parallel, state
from llama2.train.learner import Learner
from llama2.train.loop import Plan, fit
from llama2.train.objectives import make_ppo_loss

SETTINGS = Settings(
    batch_size=8,
    minibatch_size=4,
    micro_batch_size=1,
    epochs=1,
    beta=0.1,
    gamma=1.0,
    lambda_=0.95,
    unfinished=None,
    sample=Sample(max_tokens=12, precision="fp32"),
    precision="fp32",
    seed=0,
)


def train(
    inputs: Path, how: str, ranks: Ranks, save: Path | None = None
) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    """Two iterations; the weights on rank 0, and what each iteration logged."""
    policy, helpful, prompts = (Path(line) for line in inputs.read_text().splitlines())
    tokenizer = Tokenizer.load(policy)
    actor, reference = checkpoint.load(policy), checkpoint.load(policy)
    models = ActorCritic(actor, checkpoint.load_scorer(helpful))

    for module in (models, reference):
        parallel.shard(module, ranks) if how == "shard" else parallel.replicate(module, ranks)

    rewards = load_rewards(RewardModels(helpful=helpful), tokenizer, ranks, "fp32")
    watch, logged = Watch(kl_stop=1e9, updates=2), []
    source = Rollouts(
        models,
        reference.eval().requires_grad_(False),
        rewards,
        Chat(Engine(actor, slots=8, precision="fp32"), tokenizer, ranks),
        read_prompts(prompts, None, 0),
        SETTINGS,
        2,
        watch.observe,
    )
    learner = Learner(
        models, ranks, optim.AdamW(learning_rate=1e-3, eps=1e-3), apart=(ACTOR, CRITIC)
    )
    watchers = [hooks.Log(lambda step, row: logged.append(row)), watch]
    fit(
        learner,
        source,
        make_ppo_loss(),
        Plan(schedule="constant", max_steps=4, clip=0.2, log_every=99, save_every=1),
        [hooks.Checkpoint(save), *watchers] if save else watchers,
    )

    return learner.state_dict()["model"], [row for row in logged if "ppo/actor_grad_norm" in row]


def both(directory: Path, ranks: Ranks) -> None:
    for how in ("replicate", "shard"):
        whole, logged = train(directory / "inputs", how, ranks, directory / how)
        if ranks.is_main:
            expected, alone = torch.load(directory / "alone.pt")
            for name, value in expected.items():
                torch.testing.assert_close(
                    whole[name], value, rtol=1e-3, atol=1e-4, msg=f"{how}: {name}"
                )

            for mine, one in zip(logged, alone, strict=True):
                for name in (
                    "ppo/actor_grad_norm",
                    "ppo/critic_grad_norm",
                    "ppo/actor_clipped",
                    "reward/deviation",
                ):
                    assert mine[name] == pytest.approx(one[name], rel=1e-3), (how, name)

                assert mine["ppo/first_ratio_deviation"] == 0.0

            shutil.rmtree(state.find_latest(directory / how))

        ranks.barrier()
        # inside the second iteration
        resumed, _ = train(directory / "inputs", how, ranks, directory / how)
        for name, value in whole.items():
            assert torch.equal(resumed[name], value), (how, name)


def test_two_ranks_train_the_policy_of_one(tmp_path, policy, scorers, prompts):
    (tmp_path / "inputs").write_text(f"{policy}\n{scorers[0]}\n{prompts}\n")
    expected, logged = train(tmp_path / "inputs", "alone", Ranks.alone())
    head = checkpoint.load_scorer(scorers[0]).score.weight
    assert not torch.allclose(expected["critic.score.weight"], head, atol=1e-2)  # it was rescaled
    assert expected["shift"].item() != 0
    assert all(row["ppo/critic_clipped"] > 0 for row in logged)
    torch.save((expected, logged), tmp_path / "alone.pt")
    together(both, tmp_path)
