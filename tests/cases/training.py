"""Cases of training: what is learnt of a set, what is left out of it, and what is warned of."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from checks import Work, is_refusal, leaves_apart, ok, refusal

if TYPE_CHECKING:
    from run import Bench, Got


def cases() -> Iterator[tuple[str, str, Work]]:
    """Name, what is expected, and the work."""

    def sft(file: str, *more: str) -> Callable[[Bench], Got]:
        return lambda bench: bench.llama2(
            "sft",
            "--model",
            str(bench.model),
            "--dialogs.mine.path",
            bench.file(f"data/{file}"),
            "--sequence-length",
            "128",
            "--heldout",
            "0",
            "--training.precision",
            "fp32",
            "--out",
            "OUT",
            *more,
        )

    def reward(file: str, *more: str) -> Callable[[Bench], Got]:
        return lambda bench: bench.llama2(
            "reward",
            "--model",
            str(bench.model),
            "--preferences.mine.path",
            bench.file(f"data/{file}"),
            "--batch-size",
            "8",
            "--training.precision",
            "fp32",
            "--out",
            "OUT",
            *more,
        )

    yield (
        "sft_bom",
        "sft reads a byte order mark",
        lambda b: ok(sft("sft_bom.jsonl")(b), lambda got: True),
    )
    yield (
        "sft4",
        "true tokens are counted, and few updates warned of",
        lambda b: ok(
            sft("sft4.jsonl")(b),
            lambda got: (
                int(str(got.json("summary.json")["tokens"])) < 1000 and "update" in got.said
            ),
        ),
    )
    yield (
        "alp200",
        "few updates are warned of, with a batch that would mend it",
        lambda b: ok(sft("alp200.jsonl", "--epochs", "1")(b), lambda got: "batch" in got.said),
    )
    yield (
        "sft_empty",
        "empty answers teach nothing: refused with the number",
        lambda b: refusal(sft("sft_empty.jsonl")(b), "empty"),
    )
    yield (
        "sft_empty_u",
        "an empty user turn is said or kept",
        lambda b: (not (got := sft("sft_empty_u.jsonl")(b)).crashed, got.short()),
    )
    yield (
        "sft_long",
        "dropped and cut dialogs are said",
        lambda b: ok(
            sft("sft_long.jsonl")(b), lambda got: bool(re.search(r"left out|dropped", got.said))
        ),
    )
    yield (
        "sft_drop",
        "all dropped: the number, the longest and what holds it are named",
        lambda b: refusal(
            sft("sft_drop.jsonl")(b), "left out 2.*--sequence-length 256.*context.*823 tokens"
        ),
    )
    yield (
        "allcut",
        "no answer ends: warned of",
        lambda b: ok(
            sft("allcut.jsonl")(b),
            lambda got: bool(re.search("EOS|end|stop", got.said)) and "cut" in got.said,
        ),
    )
    yield (
        "sft_share",
        "the tool that reads ShareGPT is named",
        lambda b: refusal(sft("sft_share.jsonl")(b), "llama2 prepare"),
    )
    yield (
        "sft_arr.json",
        "a JSON list is read, or the tool named",
        lambda b: _read_or_named(sft("sft_arr.json")(b)),
    )
    yield (
        "sft_arrp.json",
        "... printed over lines too",
        lambda b: _read_or_named(sft("sft_arrp.json")(b)),
    )
    yield (
        "sft_id",
        "an unknown key is read, or the tool named",
        lambda b: _read_or_named(sft("sft_id.jsonl")(b)),
    )
    yield (
        "leak",
        "weights never bring a held-out dialog into training",
        lambda b: leaves_apart(b, b.file("data/leak.jsonl"), 0.2),
    )
    yield (
        "rm_ident",
        "identical pairs train nothing",
        lambda b: refusal(reward("rm_ident.jsonl")(b), "identical|same|equal"),
    )
    yield (
        "rm_empty",
        "empty pairs train nothing",
        lambda b: refusal(reward("rm_empty.jsonl")(b), "empty|identical"),
    )
    yield (
        "rm_toolong",
        "all too long: the number and the cure",
        lambda b: refusal(reward("rm_toolong.jsonl")(b), "long"),
    )
    yield (
        "rm_somelong",
        "some too long: counted aloud",
        lambda b: ok(
            reward("rm_somelong.jsonl")(b), lambda got: bool(re.search("too long|longer", got.said))
        ),
    )
    yield (
        "rm_heldout",
        "held-out pairs that are too long are counted aloud",
        lambda b: ok(
            reward("rm_good.jsonl", "--heldout.h.path", b.file("data/rm_somelong.jsonl"))(b),
            lambda got: bool(re.search("too long|longer", got.said)),
        ),
    )
    yield (
        "rm_good",
        "one update is warned of; its rate is the peak",
        lambda b: ok(
            reward("rm_good.jsonl", "--batch-size", "512")(b), lambda got: "update" in got.said
        ),
    )
    yield (
        "rm_share",
        "a share its set cannot give is refused",
        lambda b: refusal(
            reward(
                "rm_good.jsonl",
                "--preferences.few.path",
                b.file("data/rm_one.jsonl"),
                "--preferences.few.share",
                "0.5",
            )(b),
            "share",
        ),
    )
    yield (
        "rm_contra",
        "contradicting labels do not crash",
        lambda b: ok(reward("rm_contra.jsonl")(b), lambda got: True),
    )
    yield (
        "prompts_long",
        "too long prompts are counted aloud",
        lambda b: ok(
            b.rejection(b.file("data/prompts_long.jsonl")),
            lambda got: bool(re.search("left out|too long|longer", got.said)),
        ),
    )
    yield (
        "ppo eos",
        "answers that never end are alarmed of",
        lambda b: ok(_ppo(b), lambda got: "eos_rate" in str(got.json("health.json"))),
    )
    yield (
        "ppo batch 1",
        "a batch of one has no signal: refused",
        lambda b: refusal(_ppo(b, "--batch-size", "1", "--minibatch-size", "1"), "batch"),
    )


def _ppo(bench: Bench, *more: str) -> Got:
    sizes = more or ("--batch-size", "4", "--minibatch-size", "2")
    return bench.llama2(
        "ppo",
        "--policy",
        str(bench.model),
        "--rewards.helpful",
        str(bench.helpful),
        "--prompts",
        bench.file("data/prompts.jsonl"),
        "--iterations",
        "2",
        "--sample.max-tokens",
        "8",
        "--training.precision",
        "fp32",
        "--out",
        "OUT",
        *sizes,
    )


def _read_or_named(got: Got) -> tuple[bool, str]:
    return not got.crashed and (got.status == 0 or is_refusal(got, "llama2 prepare")), got.short()
