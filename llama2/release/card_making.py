"""Sections of the model card on what went into the model: its data, its stages, and what they
took."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from llama2.release import markdown as md
from llama2.release.licences import Material
from llama2.release.lineage import Lineage, Stage
from llama2.results import (
    CleanResult,
    CollectResult,
    DistillResult,
    GhostResult,
    PrepareResult,
    PretrainResult,
    RejectionResult,
    RewardResult,
    SelectResult,
    SftResult,
    TokenizeResult,
)

Licences = Mapping[tuple[str, str], str]
"""(stage, source) -> licence"""

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


def name_work(stage: Stage) -> str:
    """Return what a stage does, in words."""
    return WORK.get(stage.step.verb, stage.step.verb)


# --- data ---
def write_data(lineage: Lineage, materials: Sequence[Material]) -> str:
    """Write what the model learnt from: sources, sizes, licences."""
    licences = {(material.stage, material.name): material.licence for material in materials}
    parts = [_synthetic(lineage)]
    parts += [_text(lineage, *pair, licences) for pair in lineage.results(TokenizeResult)]
    parts += [_prepared(*pair, licences) for pair in lineage.results(PrepareResult)]
    parts += [_sets(lineage), _loose(lineage, materials), _cleaning(lineage)]
    if not any(parts):
        parts = ["What this model was trained on is not recorded."]

    return md.document("## Training data", *parts, "Licences are in `LICENSES.md`.")


def _synthetic(lineage: Lineage) -> str:
    if lineage.synthetic:
        return (
            "**All of the data is synthetic.** `llama2 world` writes it by rule about a small "
            "made-up world. The model knows nothing of the real one."
        )
    if lineage.of("world"):
        return "Some of the data is synthetic, written by `llama2 world`."

    return ""


def _text(lineage: Lineage, stage: Stage, result: TokenizeResult, licences: Licences) -> str:
    """Write of the text that was pretrained on, by source."""
    rows = []
    for name, size in sorted(result.train.sources.items()):
        licence = _licence_of(lineage, stage, name, licences)
        counts = map(md.count, (size.documents, size.bytes, size.tokens))
        rows.append((md.text(name), *counts, licence))

    total = result.train
    sums = [f"**{md.count(sum)}**" for sum in (total.documents, total.bytes, total.tokens)]
    rows.append(("**all**", *sums, ""))

    return md.document(
        "### Text for pretraining",
        f"Counted after cleaning, without what was held out.{_passes(lineage, stage, result)}",
        md.table(("Source", "Documents", "Bytes", "Tokens", "Licence"), rows, (0, 4)),
    )


def _licence_of(lineage: Lineage, stage: Stage, name: str, licences: Licences) -> str:
    for maker in filter(None, stage.origins):
        if (maker, name) in licences:
            return md.text(licences[maker, name])

    worlds = {world.name for world in lineage.of("world")}
    for clean in lineage.of("clean"):
        if clean.name in stage.origins and clean.origins <= worlds:
            return "synthetic"

    return "unknown"


def _passes(lineage: Lineage, stage: Stage, result: TokenizeResult) -> str:
    """Return how many tokens pretraining read of what a stage made."""
    results = lineage.results(PretrainResult)
    seen = sum(trained.tokens for reader, trained in results if stage.name in reader.origins)
    if not seen or not result.train.tokens:
        return ""

    times = seen / result.train.tokens
    return f" Pretraining read {md.count(seen)} tokens of it, {times:.1f} times what there is."


def _prepared(stage: Stage, result: PrepareResult, licences: Licences) -> str:
    licence = {name: text for (maker, name), text in licences.items() if maker == stage.name}
    rows = [
        (
            md.text(source.name),
            md.count(source.train),
            md.count(source.heldout),
            md.text(licence.get(source.name, "unknown")),
        )
        for source in result.sources
    ]
    return md.section(
        f"### Public {md.text(result.kind)} ({md.text(stage.name)})",
        md.table(("Source", "Records", "Held out", "Licence"), rows, (0, 3)),
    )


def _sets(lineage: Lineage) -> str:
    """Write of dialogs, comparisons and samples, in the order in which they were made or learnt
    from."""
    sizes = _list_sizes(lineage)
    stages = lineage.of("sft", "collect", "rejection", "ghost", "distill", "reward")
    rows = [(md.text(stage.name), name_work(stage), sizes.get(stage.name, "–")) for stage in stages]
    collected = ", ".join(md.code(stage.name) for stage in lineage.of("collect"))
    return md.section(
        "### Dialogs and comparisons",
        md.table(("Stage", "What", "Size"), rows, range(3)),
        md.when(
            collected,
            f"The comparisons in {collected} are those of simulated annotators, not of people.",
        ),
    )


def _list_sizes(lineage: Lineage) -> dict[str, str]:
    """Return how much each stage made or learnt from, in words."""
    sizes = {}
    for stage, sft in lineage.results(SftResult):
        sizes[stage.name] = f"{sft.dialogs:,} dialogs, {sft.tokens:,} tokens read"

    for stage, collect in lineage.results(CollectResult):
        sizes[stage.name] = f"{collect.pairs:,} comparisons"

    for stage, rejection in lineage.results(RejectionResult):
        sizes[stage.name] = f"{rejection.prompts:,} prompts, {rejection.kept:,} best answers kept"

    for stage, ghost in lineage.results(GhostResult):
        sizes[stage.name] = f"{ghost.dialogs:,} dialogs"

    for stage, distill in lineage.results(DistillResult):
        sizes[stage.name] = f"{distill.prompts:,} prompts, {distill.kept:,} safer answers kept"

    for stage, reward in lineage.results(RewardResult):
        sizes[stage.name] = f"{reward.pairs:,} pairs"

    return sizes


def _loose(lineage: Lineage, materials: Sequence[Material]) -> str:
    """Write of data from outside that no stage of preparation counted."""
    counted = {stage.name for stage in lineage.of("clean", "prepare")}
    rows = [
        (
            md.text(material.name),
            md.text(material.stage),
            md.code(material.place),
            md.text(material.licence),
        )
        for material in materials
        if material.kind == "data" and material.stage not in counted
    ]
    return md.section(
        "### Files from outside",
        md.table(("Name", "Read by", "Called here", "Licence"), rows, range(4)),
    )


def _cleaning(lineage: Lineage) -> str:
    """Write of what cleaning masked and dropped."""
    stages = lineage.of("clean")
    if not stages:
        return ""

    changes: Counter[str] = Counter()
    for _, result in lineage.results(CleanResult):
        for source in result.sources.values():
            changes.update(source.changes)

    facts = [f"{what}: {count:,}" for what, count in sorted(changes.items()) if count]
    masked = any(stage.step.config.get("mask_personal_data") for stage in stages)
    note = " Personal data were looked for by pattern and masked; that finds some and not all."
    return (
        f"What cleaning did: {'; '.join(map(md.text, facts)) or 'nothing'}.{md.when(masked, note)}"
    )


# --- stages ---
def write_recipe(lineage: Lineage) -> str:
    """Write every stage in the order in which it was made, with what it read and left."""
    rows = []
    for stage in lineage.stages:
        origins = dict.fromkeys(source.stage or source.place for source in stage.inputs)
        rows.append(
            (
                md.text(stage.name),
                name_work(stage),
                ", ".join(map(md.text, origins)) or "–",
                md.code(stage.weights[:12]) if stage.weights else "–",
                str(stage.step.manifest.get("seed", "–")),
                md.hours(stage.device_hours),
            )
        )

    return md.document(
        "## How it was made",
        "Each stage was made from those in the third column; they are the model's lineage, in "
        "order. The checkpoint is the start of the SHA-256 of its weights; device-hours are cores "
        "or accelerators times hours.",
        md.table(
            ("Stage", "What", "Made from", "Checkpoint", "Seed", "Device-hours"), rows, range(4)
        ),
        md.bullets(*(_choice(*pair) for pair in lineage.results(SelectResult))),
        "`configs/` has every stage's whole configuration, `lineage.json` its full hashes, "
        "`COMMANDS.md` the commands, versions and what to expect, `reproduce.sh` all of it as a "
        "script.",
    )


def _choice(stage: Stage, result: SelectResult) -> str:
    """Write of which version a selection kept, and why."""
    version = result.candidate if result.kept == "candidate" else result.predecessor
    share = result.overall
    return (
        f"{md.text(stage.name)} is {md.text(version)}, {md.text(result.reason)}: "
        f"{share.wins} wins, {share.losses} losses, {share.ties} ties against its predecessor."
    )


def tell_story(lineage: Lineage) -> str:
    """Tell in one or two sentences from what the model was made, through which stages."""
    tuned: dict[str, list[str]] = {}
    for stage in lineage.of("sft", "ppo"):
        if not _is_discarded(lineage, stage):
            tuned.setdefault(name_work(stage), []).append(md.text(stage.name))

    how = [f"{work} ({', '.join(names)})" for work, names in tuned.items()]
    origins = [WORK[verb] for verb in ("rejection", "ghost", "distill") if lineage.of(verb)]
    parts = [
        _begin(lineage),
        md.when(how, f"then tuned by {' and '.join(how)}"),
        md.when(origins, f"on data that came in part from {', '.join(origins)}"),
    ]
    return ", ".join(filter(None, parts))


def _begin(lineage: Lineage) -> str:
    """Tell where the weights began."""
    if lineage.of("pretrain") and not any(source.key == "model" for source in lineage.bases):
        tokens = sum(result.tokens for _, result in lineage.results(PretrainResult))
        return f"pretrained from random weights on {md.count(tokens)} tokens"

    if not lineage.bases:
        return ""

    return f"started from {', '.join(md.code(source.place) for source in lineage.checkpoints)}"


def _is_discarded(lineage: Lineage, stage: Stage) -> bool:
    """Return whether a selection preferred another to what this stage made."""
    selections = [result for _, result in lineage.results(SelectResult)]
    rejected = {result.candidate for result in selections if result.kept == "predecessor"}
    return stage.step.path.name in rejected
