"""A recipe directory as its runs would leave it, made up quickly, for tests of the report."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any, get_args

from llama2.evaluate import summary
from llama2.evaluate.conduct import Conduct
from llama2.generate.dialogue import Answer
from llama2.generate.generator import Completion
from llama2.judging import Rating
from llama2.records import DEGREES, Axis, Message, Prompt
from llama2.results import (
    AccuracyResult,
    Alarm,
    AttentionResult,
    Baselines,
    CleanedSource,
    CleanResult,
    CollectResult,
    CurvesResult,
    DialogTurn,
    DistilledAnswer,
    DistillResult,
    EvaluateResult,
    GhostExample,
    GhostResult,
    HealthResult,
    HeldoutLoss,
    Obedience,
    PpoResult,
    PretrainResult,
    Proportion,
    RankedAnswers,
    ReadCounts,
    RejectionResult,
    RewardResult,
    Rollout,
    SamplingSettings,
    SelectResult,
    SetAccuracy,
    SetShare,
    SftResult,
    StageResult,
    TokenizedSplit,
    TokenizeResult,
    TokenizerResult,
    WinShare,
)
from llama2.stages import evaluate

VERSIONS = ("SFT", "V1", "V2", "V3")
EVIL = '<script>alert("x")</script> & <b>bold</b>'


def make(root: Path, truth: bool = True) -> Path:
    """Write the recipe below `root`; without truth it looks like one on real data."""
    rng = random.Random(0)
    steps: list[tuple[str, dict[str, Any], list[StageResult], list[dict[str, float]]]] = [
        ("clean", {}, [_clean()], []),
        ("tokenizer", {}, [TokenizerResult(vocab_size=1024, fingerprint="f" * 64)], []),
        ("tokenize", {}, [_tokenize()], []),
        ("pretrain", {"shards": f"{root}/tokenize"}, [_pretrain()], _losses(rng, 300, 6.9, 1.5)),
        ("sft", {"model": f"{root}/pretrain"}, [_sft(6000, 500000)], _losses(rng, 120, 2.5, 0.9)),
        ("collect", {"policy": f"{root}/sft"}, [_collect()], []),
        *(
            (
                f"reward-{axis}",
                {"model": f"{root}/sft"},
                [_reward(), AccuracyResult(sets=_accuracy())],
                [
                    {"step": s, "reward/accuracy": 0.6 + 0.2 * (1 - math.exp(-s / 20))}
                    for s in range(0, 100, 5)
                ],
            )
            for axis in ("helpful", "safe")
        ),
        (
            "rejection",
            {"policy": f"{root}/sft", "rewards": {"helpful": f"{root}/reward-helpful"}},
            [_rejection(), _curves()],
            [],
        ),
        (
            "v1",
            {
                "model": f"{root}/pretrain",
                "dialogs": {"pool": {"path": f"{root}/rejection/pool.jsonl"}},
            },
            [_sft(7600, 700000)],
            _losses(rng, 120, 1.0, 0.6),
        ),
        ("ghost", {"policy": f"{root}/v1"}, [_ghost()], []),
        ("distill", {"policy": f"{root}/sft"}, [_distill()], []),
        (
            "ppo",
            {"policy": f"{root}/v1"},
            [PpoResult(parameters=1_070_000, steps=30, tokens=90_000, trained=40_000), _health()],
            [
                {
                    "step": s,
                    "ppo/kl_reference": s / 100,
                    "ppo/entropy": 2 - s / 50,
                    "ppo/clip_fraction": 0.02,
                    "ppo/length": 30 + s / 3,
                    "ppo/explained_variance": 1 - math.exp(-s / 6),
                    "ppo/eos_rate": 0.98,
                    "reward/mean": s / 40,
                    "reward/helpfulness": 0.6 + s / 300,
                    "heldout/reward": 0.5 + s / 100,
                    "heldout/unsafe": 0.6 + s / 200,
                    "heldout/borderline": 0.5 - s / 200,
                }
                for s in range(30)
            ],
        ),
        ("select", {"candidate": f"{root}/ppo"}, [_select()], []),
        (
            "evaluate",
            {"versions": {"SFT": f"{root}/sft"}},
            [evaluation(truth), _attention(rng)],
            [],
        ),
        ("report", {}, [], []),
    ]
    begin = 0

    for index, (name, config, results, metrics) in enumerate(steps):
        seconds = 20.0 + 7 * index
        verb = "sft" if name == "v1" else name.split("-")[0]
        _write(
            root / name / "manifest.json",
            {
                "verb": verb,
                "config": config,
                "device": "cpu",
                "ranks": 1,
                "threads": 2,
                "code": "0.1.0+abc",
                "started": f"2026-01-01T00:{begin // 60:02}:{begin % 60:02}Z",
            },
        )
        begin += int(seconds)

        for result in results:
            assert result.stage == verb
            _write(root / name / result.file, result.dump())

        if metrics:
            lines = [json.dumps(row) for row in metrics]
            (root / name / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 9']))

        if verb != "report":
            _write(root / name / "COMPLETE", {"outputs": {}, "seconds": seconds})

    _write(root / "steps.json", [name for name, *_ in steps])
    return root


def _clean() -> CleanResult:
    changes = {"duplicate documents removed": 40}
    web = CleanedSource(documents=500, kept=460, heldout=10, bytes=591600, changes=changes)
    return CleanResult(sources={"web": web})


def _tokenize() -> TokenizeResult:
    return TokenizeResult(
        train=TokenizedSplit(documents=450, tokens=200000, bytes=580000, sources={}),
        validation=TokenizedSplit(documents=10, tokens=4000, bytes=11600, sources={}),
    )


def _pretrain() -> PretrainResult:
    return PretrainResult(
        parameters=1_070_000,
        steps=300,
        tokens=4_300_000,
        trained=4_300_000,
        validation=HeldoutLoss(loss=1.5, bits_per_byte=0.81),
        xz_bits_per_byte=1.62,
    )


def _sft(dialogs: int, tokens: int) -> SftResult:
    return SftResult(
        parameters=1_070_000,
        steps=120,
        tokens=tokens,
        trained=tokens // 2,
        dialogs=dialogs,
        heldout=0,
        cut=0,
        dropped=0,
        fill=0.99,
        sources={"mine": ReadCounts(read=dialogs, kept=dialogs, skipped={})},
    )


def _collect() -> CollectResult:
    return CollectResult(
        pairs=7300,
        heldout=800,
        unjudged=0,
        dropped=200,
        degrees=dict(zip(DEGREES, (2600, 1800, 1500, 1400))),
        axes={"helpful": 5200, "safe": 2100},
        safety={"preferred_only": 800, "both": 900, "neither": 400},
    )


def _reward() -> RewardResult:
    return RewardResult(
        parameters=1_070_000,
        steps=100,
        tokens=900_000,
        trained=14_600,
        pairs=7300,
        sets={"round-1": SetShare(pairs=7300, share=1.0)},
        read={},
    )


def _rejection() -> RejectionResult:
    example = RankedAnswers(
        prompt=EVIL, worst="No.", best="Yes.", worst_reward=0.1, best_reward=0.9
    )
    return RejectionResult(
        prompts=1600,
        k=8,
        kept=1580,
        earlier=0,
        pool={"this round": 1580},
        temperature=1.0,
        examples=[example],
    )


def _curves() -> CurvesResult:
    return CurvesResult(
        k=list(range(1, 9)),
        max=[0.5 + 0.1 * math.log2(k) for k in range(1, 9)],
        median=[0.5] * 8,
        temperatures={"0.8": 1.2, "1.0": 1.5, "1.2": 1.3},
        temperature=1.0,
    )


def _ghost() -> GhostResult:
    turns = [DialogTurn(role="user", content=EVIL), DialogTurn(role="assistant", content="Hi.")]
    return GhostResult(
        conversations=160, dialogs=960, turns=960, examples=[GhostExample(messages=turns)]
    )


def _distill() -> DistillResult:
    return DistillResult(
        prompts=400,
        kept=120,
        templated=0,
        safety_before=0.55,
        safety_after=0.83,
        examples=[DistilledAnswer(prompt="How?", before="Do.", after="I cannot.")],
    )


def _health() -> HealthResult:
    alarm = Alarm(
        name="kl", step=12, value=1.25, cause="the policy leaves its start", remedy="raise beta"
    )
    return HealthResult(alarms=[alarm], samples=[Rollout(prompt="Hi", answer=EVIL, reward=0.5)])


def _select() -> SelectResult:
    return SelectResult(
        candidate="ppo",
        predecessor="v2",
        kept="predecessor",
        reason="it lost on held-out prompts",
        needed=0.5,
        win_rate={
            "all": WinShare(wins=46, losses=54, ties=9, rate=0.46, low=0.37, high=0.56),
            "unsafe": WinShare(wins=0, losses=0, ties=3, rate=None, low=0.0, high=1.0),
        },
    )


def evaluation(truth: bool = True, rules: bool = False, mute: bool = False) -> EvaluateResult:
    """An evaluation of four versions that get better, but for the last; by `rules` and a judge
    apart, where asked for. The versions after the first are `mute`, where that is asked for."""
    rng = random.Random(1)
    families = ["fact", "list", "sum", "unsafe", "borderline"] * 40
    prompts = [
        Prompt(
            (Message("user", f"{EVIL if i == 3 else 'Question'} {i}?"),),
            f"p{i}",
            family in ("unsafe", "borderline"),
            {"family": family},
        )
        for i, family in enumerate(families)
    ]
    results = {}

    for level, name in enumerate(VERSIONS):
        skill = 0.5 + 0.12 * min(level, 2)
        ratings = [_rate(family, skill, rng) for family in families]
        answers = [
            Answer(
                EVIL if i == 3 else f"Answer {i} of {name}.",
                Completion(
                    (1,),
                    (5,) * rng.randint(5, 40),
                    (0.0,),
                    "stop" if rng.random() < 0.97 else "length",
                ),
            )
            for i in range(len(families))
        ]
        scores = {
            axis: [min(1.0, max(0.0, rng.gauss(skill, 0.2))) for _ in families]
            for axis in get_args(Axis)
        }
        keeps = 1.0 if level >= 2 else 0.3
        ghost = [
            Proportion(
                rate=max(0.0, 0.99 - (1 - keeps) * turn / 5), n=60, low=0.9 * keeps, high=1.0
            )
            for turn in range(6)
        ]
        talks = [
            tuple(
                Message("user" if i % 2 == 0 else "assistant", f"DialogTurn {i} of {name}.")
                for i in range(12)
            )
        ]
        results[name] = summary.Version(
            answers,
            ratings if truth else None,
            ratings if truth else None,
            scores,
            Obedience(user=ghost, system=ghost),
            talks,
            _conducts(families, skill, rng, mute and level > 0) if rules else None,
            {"<apart>": scores["safe"]} if rules else {},
        )

    runs = zip(VERSIONS, ("sft", "v1", "v2", "ppo"))
    checkpoints = {name: f"/runs/demo/{run}" for name, run in runs}
    sampling = SamplingSettings(temperature=0.6, top_p=0.9, max_tokens=64)
    judges = {"<apart>": evaluate.OtherJudge(model=Path("apart"), axis="safe")} if rules else {}
    names = {"helpful": "reward-helpful", "<apart>": "apart"} if rules else {}
    return evaluate.summarise(prompts, results, 8, checkpoints, sampling, judges, names)


def _conducts(families: list[str], skill: float, rng: random.Random, mute: bool) -> list[Conduct]:
    conducts = []
    for family in families:
        declines = rng.random() < (2 * skill - 0.5 if family == "unsafe" else 0.1)
        refusal = "full refusal" if declines else "full compliance"
        conducts.append(Conduct(refusal, False, "empty" if mute else ""))  # type: ignore[arg-type]

    return conducts


def _rate(family: str, skill: float, rng: random.Random) -> Rating:
    if family == "unsafe":
        safe = rng.random() < 2 * skill - 0.5
        return Rating(0.8 if safe else 0.0, safe, safe)

    refused = family == "borderline" and rng.random() < 0.1
    return Rating(0.0 if refused else min(1.0, max(0.0, rng.gauss(skill, 0.1))), True, refused)


def _losses(rng: random.Random, count: int, top: float, bottom: float) -> list[dict[str, float]]:
    rows = []
    for step in range(1, count + 1):
        loss = bottom + (top - bottom) * math.exp(-6 * step / count) + rng.gauss(0, 0.05)
        rows.append(
            {
                "step": step,
                "train/loss": loss,
                "train/lr": 1e-3,
                "train/grad_norm": 1 + rng.random(),
                "perf/tokens_per_second": 33000 + rng.gauss(0, 500),
                "perf/mfu": 0.42,
            }
        )
        if step % (count // 6) == 0:
            rows[-1] |= {
                "validation/loss": loss + 0.05,
                "validation/bits_per_byte": (loss + 0.05) / 2,
            }

    return rows


def _accuracy() -> dict[str, SetAccuracy]:
    def one(share: float) -> Proportion:
        return Proportion(rate=share, n=200, low=share - 0.04, high=min(1.0, share + 0.04))

    degrees = dict(zip((*DEGREES, "all"), map(one, (0.95, 0.80, 0.66, 0.54, 0.74))))
    baselines = Baselines(longer=one(0.61), bag_of_words=one(0.72))
    return {
        "helpful": SetAccuracy(**degrees, baselines=baselines),
        "safe": SetAccuracy(**{**degrees, "significantly": one(0.80)}),
    }


def _attention(rng: random.Random) -> AttentionResult:
    def map_of(level: float) -> list[list[float]]:
        return [
            [(level if column < 4 else 0.1) * rng.random() for column in range(40)]
            for _ in range(20)
        ]

    levels = {"V1": 0.2, "V2": 0.8}
    return AttentionResult(
        names=["V1", "V2"],
        maps={name: map_of(level) for name, level in levels.items()},
        dialogs=16,
        instruction_by_turn={name: [level, level, level / 2] for name, level in levels.items()},
        bin=2,
        instruction="Always speak Foo.",
        instruction_bins=(1.0, 4.0),
        columns=[f"t{i}" for i in range(40)],
    )


def _write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
