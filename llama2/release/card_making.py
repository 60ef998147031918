"""Sections of the model card on what went into the model: its data, its stages, and what they
took."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llama2.release import markdown as md
from llama2.release.licences import Material
from llama2.release.lineage import Lineage, Stage
from llama2.results import CleanResult

WORK = {
    "world": "synthetic data",
    "prepare": "public data",
    "clean": "cleaning",
    "tokenizer": "tokenizer",
    "tokenize": "token shards",
    "pretrain": "pretraining",
    "sft": "supervised fine-tuning",
    "collect": "comparisons",
    "reward": "reward model",
    "rejection": "rejection sampling",
    "ghost": "Ghost Attention",
    "distill": "safety context distillation",
    "ppo": "PPO",
    "select": "selection",
}


def work_of(stage: Stage) -> str:
    """What a stage does, in words."""
    return WORK.get(stage.step.verb, stage.step.verb)


# ---- data
# -----------------------------------------------------------------------------------------------------------
def data(lineage: Lineage, materials: Sequence[Material]) -> str:
    """What the model learnt from: sources, sizes, licences."""
    licences = {(one.stage, one.name): one.licence for one in materials}
    parts = [
        _synthetic(lineage),
        *(_text(lineage, stage, licences) for stage in lineage.of("tokenize")),
        *(_prepared(stage, licences) for stage in lineage.of("prepare")),
        _sets(lineage),
        _loose(lineage, materials),
        _cleaning(lineage),
    ]
    found = [part for part in parts if part]

    return md.document(
        "## Training data",
        *(found or ["What this model was trained on is not recorded."]),
        "Licences are in `LICENSES.md`.",
    )


def _synthetic(lineage: Lineage) -> str:
    if lineage.synthetic:
        return (
            "**All of the data is synthetic.** `llama2 world` writes it by rule about a small made-up world. The "
            "model knows nothing of the real one."
        )

    return (
        "Some of the data is synthetic, written by `llama2 world`." if lineage.of("world") else ""
    )


def _text(lineage: Lineage, stage: Stage, licences: Mapping[tuple[str, str], str]) -> str:
    """The text that was pretrained on, by source."""
    train = stage.step.summary.get("train") or {}
    sources: Mapping[str, Any] = train.get("sources") or {}
    cleaned = {one.stage for one in stage.inputs}
    synthetic = {
        one.name
        for one in lineage.of("clean")
        if {each.stage for each in one.inputs} <= {world.name for world in lineage.of("world")}
    }

    def licence(name: str) -> str:
        said = next(
            (
                licences[maker, name]
                for maker in cleaned
                if (maker or "", name) in licences and maker
            ),
            None,
        )
        return md.text(said) if said else "synthetic" if cleaned & synthetic else "unknown"

    rows = [
        (
            md.text(name),
            *(md.count(counts.get(key)) for key in ("documents", "bytes", "tokens")),
            licence(name),
        )
        for name, counts in sorted(sources.items())
    ]
    rows.append(
        (
            "**all**",
            *(f"**{md.count(train.get(key))}**" for key in ("documents", "bytes", "tokens")),
            "",
        )
    )
    seen = sum(
        one.step.summary.get("tokens") or 0
        for one in lineage.of("pretrain")
        if stage.name in {each.stage for each in one.inputs}
    )
    again = (
        f" Pretraining read {md.count(seen)} tokens of it, {seen / train['tokens']:.1f} times what there is."
        if seen and train.get("tokens")
        else ""
    )

    return md.document(
        "### Text for pretraining",
        f"Counted after cleaning, without what was held out.{again}",
        md.table(("Source", "Documents", "Bytes", "Tokens", "Licence"), rows, (0, 4)),
    )


def _prepared(stage: Stage, licences: Mapping[tuple[str, str], str]) -> str:
    sources = stage.step.summary.get("sources")
    rows = [
        (
            md.text(one.get("name", "")),
            md.count(one.get("train")),
            md.count(one.get("heldout")),
            md.text(licences.get((stage.name, str(one.get("name"))), "unknown")),
        )
        for one in (sources if isinstance(sources, list) else [])
    ]
    kind = md.text(stage.step.summary.get("kind", "records"))

    return (
        md.document(
            f"### Public {kind} ({md.text(stage.name)})",
            md.table(("Source", "Records", "Held out", "Licence"), rows, (0, 3)),
        )
        if rows
        else ""
    )


_COUNTED = {
    "sft": (("dialogs", "dialogs"), ("tokens", "tokens read")),
    "collect": (("pairs", "comparisons"),),
    "rejection": (("prompts", "prompts"), ("kept", "best answers kept")),
    "ghost": (("dialogs", "dialogs"),),
    "distill": (("prompts", "prompts"), ("kept", "safer answers kept")),
    "reward": (("pairs", "pairs"),),
}


def _sets(lineage: Lineage) -> str:
    """Dialogs, comparisons and samples, in the order in which they were made or learnt from."""
    rows = []
    for stage in lineage.of(*_COUNTED):
        facts = [
            f"{md.count(stage.step.summary[key])} {what}"
            for key, what in _COUNTED[stage.step.verb]
            if isinstance(stage.step.summary.get(key), (int, float))
        ]
        rows.append((md.text(stage.name), work_of(stage), ", ".join(facts) or "–"))

    people = (
        (
            "The comparisons in "
            + ", ".join(md.code(stage.name) for stage in lineage.of("collect"))
            + " are those of simulated annotators, not of people."
        )
        if lineage.of("collect")
        else ""
    )
    return (
        md.document(
            "### Dialogs and comparisons",
            md.table(("Stage", "What", "Size"), rows, range(3)),
            people,
        )
        if rows
        else ""
    )


def _loose(lineage: Lineage, materials: Sequence[Material]) -> str:
    """Data from outside that no stage of preparation counted."""
    counted = {stage.name for stage in lineage.of("clean", "prepare")}
    rows = [
        (md.text(one.name), md.text(one.stage), md.code(one.place), md.text(one.licence))
        for one in materials
        if one.kind == "data" and one.stage not in counted
    ]
    return (
        md.document(
            "### Files from outside",
            md.table(("Name", "Read by", "Called here", "Licence"), rows, range(4)),
        )
        if rows
        else ""
    )


def _cleaning(lineage: Lineage) -> str:
    """What cleaning masked and dropped."""
    totals: dict[str, int] = {}
    for stage in lineage.of("clean"):
        result = stage.step.result(CleanResult) or CleanResult(sources={})
        for source in result.sources.values():
            for what, count in source.changes.items():
                totals[what] = totals.get(what, 0) + count

    facts = [f"{what}: {count:,}" for what, count in sorted(totals.items()) if count]
    masked = [stage for stage in lineage.of("clean") if stage.step.config.get("mask_personal_data")]
    hidden = (
        " Personal data were looked for by pattern and masked; that finds some and not all."
        if masked
        else ""
    )

    return (
        f"What cleaning did: {'; '.join(map(md.text, facts)) or 'nothing'}.{hidden}"
        if lineage.of("clean")
        else ""
    )


# ---- stages
# ---------------------------------------------------------------------------------------------------------
def recipe(lineage: Lineage) -> str:
    """Every stage in the order in which it was made, with what it read and left."""
    rows = []
    for stage in lineage.stages:
        made = list(dict.fromkeys(one.stage if one.stage else one.place for one in stage.inputs))
        rows.append(
            (
                md.text(stage.name),
                work_of(stage),
                ", ".join(map(md.text, made)) or "–",
                md.code(stage.weights[:12]) if stage.weights else "–",
                str(stage.step.manifest.get("seed", "–")),
                md.hours(stage.device_hours),
            )
        )

    kept = [_kept(stage) for stage in lineage.of("select")]
    return md.document(
        "## How it was made",
        "Each stage was made from those in the third column; they are the model's lineage, in order. The checkpoint is "
        "the start of the SHA-256 of its weights; device-hours are cores or accelerators times hours.",
        md.table(
            ("Stage", "What", "Made from", "Checkpoint", "Seed", "Device-hours"), rows, range(4)
        ),
        md.bullets(*kept),
        "`configs/` has every stage's whole configuration, `lineage.json` its full hashes, `COMMANDS.md` the commands, "
        "versions and what to expect, `reproduce.sh` all of it as a script.",
    )


def _kept(stage: Stage) -> str:
    found = stage.step.read("verdict.json")
    which = found.get(str(found.get("kept")))
    if which is None:
        return ""

    won = (found.get("win_rate") or {}).get("all") or {}
    decided = (
        f": {won['wins']} wins, {won['losses']} losses, {won['ties']} ties against its predecessor"
        if "wins" in won
        else ""
    )
    return (
        f"{md.text(stage.name)} is {md.text(which)}, {md.text(found.get('reason', ''))}{decided}."
    )


def story(lineage: Lineage) -> str:
    """In one or two sentences: from what, through which stages."""
    pretrained = lineage.of("pretrain")
    steps = [
        stage
        for stage in lineage.stages
        if stage.step.verb in ("sft", "ppo") and not _discarded(lineage, stage)
    ]
    begin = ""

    if pretrained and not any(one.key == "model" for _, one in lineage.bases):
        tokens = sum(stage.step.summary.get("tokens") or 0 for stage in pretrained)
        begin = f"pretrained from random weights on {md.count(tokens)} tokens"
    elif lineage.bases:
        begin = f"started from {', '.join(md.code(one.place) for _, one in lineage.bases if one.key != 'tokenizer')}"

    tuned: dict[str, list[str]] = {}
    for stage in steps:
        tuned.setdefault(work_of(stage), []).append(md.text(stage.name))

    ways = [
        name
        for verb, name in WORK.items()
        if verb in ("rejection", "ghost", "distill") and lineage.of(verb)
    ]
    how = [f"{work} ({', '.join(names)})" for work, names in tuned.items()]
    parts = [
        begin,
        f"then tuned by {' and '.join(how)}" if how else "",
        f"on data that came in part from {', '.join(ways)}" if ways else "",
    ]

    return ", ".join(part for part in parts if part)


def _discarded(lineage: Lineage, stage: Stage) -> bool:
    """Whether a selection preferred another to what this stage made."""
    return any(
        found.get("kept") == "predecessor" and found.get("candidate") == stage.step.path.name
        for one in lineage.of("select")
        for found in [one.step.read("verdict.json")]
    )
