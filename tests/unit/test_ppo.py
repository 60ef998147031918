"""PPO's stage: what each iteration says of its updates, and where the judge waits."""

import re

import pytest
import torch
from answers import answer, prompt
from commands import llama2

from llama2.errors import UserError
from llama2.generate.rewards import RewardModels
from llama2.ranks import Ranks
from llama2.stages.common.ppo_stopping import BestPolicy, measure_reward, swap_in
from llama2.stages.common.ppo_watch import Watch, measure_clipping
from llama2.stages.common.sampling import load_rewards
from llama2.stages.common.training import load_policy, make_saver
from llama2.tokenizer.tokenizer import Tokenizer
from llama2.train.loop import Hook, Plan, Report, TrainingState

ALONE = Ranks.alone()


def test_the_share_of_a_gradient_that_clipping_takes_away():
    assert measure_clipping(0.0, 1.0) == measure_clipping(1.0, 1.0) == 0.0
    assert measure_clipping(4.0, 1.0) == 0.75
    assert measure_clipping(4.0, 2.0) == 0.5


class Said(Hook):
    def __init__(self) -> None:
        self.rows = []

    def on_log(self, step, metrics):
        self.rows.append(dict(metrics))


def report(step, actor, critic):
    return Report(
        step,
        {"ppo/ratio_deviation": 3.0 * (step % 2 == 1)},
        6.0,
        1,
        1,
        0.1,
        {"actor.": actor, "critic.": critic},
        1e-6,
    )


def test_each_iteration_says_how_each_tower_was_clipped():
    said, watch = Said(), Watch(kl_stop=9.0, updates=2)
    training = TrainingState(None, None, Plan(clip=1.0), [said, watch])
    training.learner = type("Learner", (), {"step": 0})

    for step, norms in enumerate([(0.5, 20.0), (2.0, 4.0), (1.0, 1.0), (1.0, 1.0)], 1):
        if step % 2:
            watch.observe({"ppo/kl_reference": 0.1})

        watch.on_step(training, report(step, *norms))
        if step == 1:  # stopped inside of an iteration, another goes on
            state, watch = watch.state_dict(), Watch(kl_stop=9.0, updates=2)
            watch.load_state_dict(state)
            training.hooks = [said, watch]

    first, second = said.rows
    assert first["ppo/actor_grad_norm"] == pytest.approx(1.25)
    assert first["ppo/critic_grad_norm"] == pytest.approx(12.0)
    assert first["ppo/actor_clipped"] == pytest.approx((0 + 0.5) / 2)
    assert first["ppo/critic_clipped"] == pytest.approx((0.95 + 0.75) / 2)
    assert first["ppo/first_ratio_deviation"] == 0.5
    assert (second["ppo/actor_grad_norm"], second["ppo/actor_clipped"]) == (1.0, 0.0)
    assert not training.finish


def test_the_judge_is_on_the_device_only_while_it_judges(scorers, policy, monkeypatch):
    tokenizer, moves = Tokenizer.load(policy), []
    judge = load_rewards(RewardModels(helpful=scorers[1]), tokenizer, ALONE, "fp32")
    rewards = load_rewards(
        RewardModels(helpful=scorers[0], safe=scorers[1]), tokenizer, ALONE, "fp32"
    )
    names = {id(judge.helpful): "judge", id(rewards.helpful): "helpful", id(rewards.safe): "safe"}
    monkeypatch.setattr(
        torch.nn.Module, "to", lambda self, where: moves.append((names[id(self)], str(where)))
    )

    with swap_in(judge, rewards, torch.device("cuda")):
        assert moves == [("helpful", "cpu"), ("safe", "cpu"), ("judge", "cuda")]

    assert moves[3:] == [("judge", "cpu"), ("helpful", "cuda"), ("safe", "cuda")]

    monkeypatch.undo()
    before = rewards([[1, 9, 2]], [False])

    with swap_in(judge, rewards, ALONE.device):
        assert judge([[1, 9, 2]], [False])[0].helpful == before[0].safe

    assert rewards([[1, 9, 2]], [False]) == before


def test_why_it_stopped_and_what_is_kept_is_said(policy, scorers, prompts, tmp_path, capsys):
    words = [
        "ppo",
        "--policy",
        policy,
        "--rewards.helpful",
        scorers[0],
        "--prompts",
        prompts,
        "--iterations",
        5,
        "--batch-size",
        4,
        "--minibatch-size",
        2,
        "--sample.max-tokens",
        8,
    ]
    assert (
        llama2(
            *words,
            "--kl-stop",
            1e-9,
            "--training.optimizer.learning-rate",
            1e-2,
            "--out",
            tmp_path / "kl",
        )
        == 0
    )
    line = next(line for line in capsys.readouterr().err.splitlines() if ": stopped at" in line)
    assert re.fullmatch(
        rf"{tmp_path}/kl: stopped at update \d of 10: the mean KL of an answer from the start is \S+ "
        "nats, over kl_stop 1e-09",
        line,
    )
    # 1e-12: no weight moves, and nothing improves
    assert (
        llama2(
            *words,
            "--heldout",
            prompts,
            "--validate-iterations",
            1,
            "--patience",
            2,
            "--training.optimizer.learning-rate",
            1e-12,
            "--training.optimizer.weight-decay",
            0,
            "--out",
            tmp_path / "still",
        )
        == 0
    )
    assert (
        f"{tmp_path}/still: stopped at update 4 of 10: 2 validations in a row brought no improvement; the policy "
        "kept is that of update 0, the best on held-out prompts (heldout/reward 0."
    ) in capsys.readouterr().err


def test_held_out_prompts_count_by_kind(scorers, policy):
    class Chat:
        tokenizer = Tokenizer.load(policy)

    class Judge:
        def __call__(self, rows, tags):
            return [type("Score", (), {"reward": 0.0 if tag else 1e9}) for tag in tags]

    prompts = [prompt("Hi", safety=True), prompt("One"), prompt("Two"), prompt("Three")]
    found = measure_reward(Chat(), Judge(), prompts, [[answer()]] * 4)
    assert found == {"heldout/unsafe": 0.5, "heldout/helpful": 1.0, "heldout/reward": 0.75}


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_best_policy_that_was_damaged_meanwhile_is_not_taken(policy, tmp_path, name):
    best, out = tmp_path / "checkpoints/best", tmp_path / "out"
    out.mkdir()
    actor, tokenizer = load_policy(policy, ALONE.device)
    policy_kept = BestPolicy(best, make_saver(actor, tokenizer, ALONE), tokenizer, ALONE)
    policy_kept.keep()
    policy_kept.adopt(out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {
        path.name: path.read_bytes() for path in best.iterdir()
    }
    content = bytearray((best / name).read_bytes())
    content[len(content) // 2] ^= 1
    (best / name).write_bytes(content)

    with pytest.raises(
        UserError,
        match=rf"best/{name}: its checksum differs.*delete {best.parent}: the same command",
    ):
        policy_kept.adopt(out)
