"""Sections of the model card on what was measured, and the same as `model-index` for programs.

Everything here stands in a run's files. What was not measured is named as such, so that no gap
looks like a success.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from llama2.records import DEGREES
from llama2.release import markdown as md
from llama2.release.lineage import Lineage
from llama2.release.measurements import UNSAFE_BELOW, Category, Measured
from llama2.results import BASELINES, AccuracyResult, Proportion

AXES = {"helpful": "helpfulness", "safe": "harmlessness"}
NOTHING = "**Not measured.** No evaluation beside this run compares it with anything."
_TRUTH, _REWARD = "ground truth", "reward model"
JUDGES = {"truth": _TRUTH, "reward": _REWARD}


# ---- how it was measured
# ------------------------------------------------------------------------------------------
def method(lineage: Lineage, found: Measured) -> str:
    """Prompts, sampling, judges, and what to think of them."""
    sampling: Mapping[str, Any] = found.content.get("sampling") or {}
    how = ", ".join(
        f"{md.text(key.replace('_', ' '))} {value:g}" for key, value in sampling.items()
    )
    kinds = ", ".join(
        f"{count:,} {kind}" for kind, count in (found.content.get("prompts") or {}).items() if count
    )

    return md.bullets(
        f"This model is {md.code(found.name)} in the evaluation {md.code(found.step.name)}. Prompts: {kinds}. One "
        f"answer each, sampled with {how}.",
        _readers(lineage, found),
        "Ground truth is a program that knows the synthetic world and rates an answer by rule: it stands for people "
        "here, and nobody else has looked."
        if found.truthful
        else "No person and no ground truth has judged the answers: the reward models below are all there is.",
        _dependent(lineage, found),
        "Intervals are 95 %: Wilson's for shares, the normal one for means. They tell what chance in the choice of "
        "prompts and answers may do, not how another seed of training would have come out: it was trained once.",
    )


def _readers(lineage: Lineage, found: Measured) -> str:
    """Which stages behind the model have read the prompts it is measured with."""
    prompts = next(
        (one for one in lineage.describe(found.step).inputs if one.key == "prompts"), None
    )
    read = [
        (stage.name, one.key)
        for stage in lineage.stages
        for one in stage.inputs
        if one.digest == found.prompts_digest
        or (
            prompts is not None
            and (prompts.place == one.place or prompts.place.startswith(f"{one.place}/"))
        )
    ]
    learnt = sorted({name for name, key in read if key.partition(".")[0] != "exclude"})

    if learnt:
        return (
            f"**{', '.join(map(md.code, learnt))} read these prompts, and the model was made from that:** the "
            "figures flatter it."
        )

    also = " but to leave them out of its own data" if read else ""
    return f"No stage that the model was made from read the file of these prompts{also}."


def _dependent(lineage: Lineage, found: Measured) -> str:
    trained = [axis for axis, digest in found.judges.items() if digest in lineage.digests]
    if not trained:
        return ""

    names = " and ".join(AXES[axis] for axis in trained)
    who = "The reward models that judge" if len(trained) > 1 else "The reward model that judges"
    return (
        f"{who} {names} also trained this model or chose its data: a judge that is too kind wherever the model has "
        "learnt to please it."
    )


# ---- results
# --------------------------------------------------------------------------------------------------------
def evaluation(lineage: Lineage, found: Measured | None) -> str:
    """What it does, by version, axis and family; reward models; Ghost Attention; pretraining."""
    models = md.document(_pretraining(lineage), _rewards(lineage)).strip()
    if found is None:
        return md.document("## Evaluation", NOTHING, models)

    return md.document(
        "## Evaluation",
        method(lineage, found),
        _versions(lineage, found),
        _wins(found),
        _families(found),
        _ghost(found),
        models,
    )


def _versions(lineage: Lineage, found: Measured) -> str:
    rows = []
    for name in found.versions:
        result = found.content["results"][name]
        truth: Mapping[str, Any] = result.get("truth") or {}
        row = [md.text(name) if name != found.name else f"**{md.text(name)}, this model**"]
        row += (
            [md.mean(truth.get(key)) for key in ("helpfulness", "helpfulness_greedy")]
            if found.truthful
            else []
        )
        row += [md.mean((result.get("rewards") or {}).get(axis)) for axis in AXES]
        rows.append((*row, f"{result['length']['mean']:.1f}", md.percent(result["eos"]["rate"])))

    headers = [
        "Version",
        *(("Helpfulness", "Helpfulness, greedy") if found.truthful else ()),
        "Reward, helpful",
        "Reward, safe",
        "Tokens an answer",
        "Ends by itself",
    ]
    return md.document(
        "### Versions",
        md.table(headers, rows),
        ("Helpfulness runs from 0 to 1, on helpful prompts. " if found.truthful else "")
        + "A reward is the probability that the reward model gives: of helpfulness on helpful prompts, of safety on "
        "unsafe ones.",
    )


def _wins(found: Measured) -> str:
    rows = [
        (
            md.text(row["against"]),
            AXES[row["axis"]],
            JUDGES[row["judge"]],
            md.count(row["wins"]),
            md.count(row["losses"]),
            md.count(row["ties"]),
            md.rate(row) if row["rate"] is not None else "all ties",
        )
        for row in _own(found)
    ]
    return (
        md.document(
            "### Win rates of this model",
            md.table(
                ("Against", "On", "Judge", "Wins", "Losses", "Ties", "Win rate, ties removed"),
                rows,
                (0, 1, 2),
            ),
            md.bullets(*_lost(found), *_disagreements(found)),
        )
        if rows
        else ""
    )


def _lost(found: Measured) -> Iterator[str]:
    """The comparisons that the model lost, as surely as the interval says."""
    for row in _own(found):
        if row["rate"] is not None and row["high"] < 0.5:
            yield f"**It falls behind {md.text(row['against'])} in {AXES[row['axis']]}, by {JUDGES[row['judge']]}.**"


def _disagreements(found: Measured) -> Iterator[str]:
    """Where ground truth and reward model tell opposite winners."""
    rows = {
        (row["against"], row["axis"], row["judge"]): row
        for row in _own(found)
        if row["rate"] is not None
    }
    for (against, axis, judge), row in rows.items():
        other = rows.get((against, axis, "reward"))
        if (
            judge == "truth"
            and other is not None
            and (row["rate"] - 0.5) * (other["rate"] - 0.5) < 0
        ):
            yield (
                f"Against {md.text(against)} in {AXES[axis]} the judges disagree. Trust ground truth: the reward "
                "model may have been pleased without the answers being better."
            )


def _own(found: Measured) -> list[Mapping[str, Any]]:
    return [row for row in found.content.get("win_rates", []) if row["version"] == found.name]


def _families(found: Measured) -> str:
    families: Mapping[str, Any] = (found.result.get("truth") or {}).get("families") or {}
    rows = [
        (md.text(name), md.count(one["n"]), md.mean(one))
        for name, one in sorted(families.items(), key=lambda item: item[1]["mean"])
    ]
    return (
        md.document(
            "### Helpfulness by family of prompts",
            md.table(("Family", "Prompts", "Helpfulness"), rows),
        )
        if rows
        else ""
    )


def _ghost(found: Measured) -> str:
    places: Mapping[str, Any] = found.result.get("ghost") or {}
    shown = {
        name: turns
        for name, turns in (("user", places.get("user")), ("system", places.get("system")))
        if turns
    }
    if not shown:
        return md.document("### An instruction that is to last", "Not measured.")

    rows = [
        (
            f"in the {'first user turn' if name == 'user' else 'system message'}",
            *(md.rate(turn) for turn in turns),
        )
        for name, turns in shown.items()
    ]
    longest = max(map(len, shown.values()))
    talks = next(iter(shown.values()))[0]["n"]

    return md.document(
        "### An instruction that is to last",
        f"Share of answers that obey, turn by turn, an instruction given once; {talks} conversations.",
        md.table(
            ("Instruction", *(f"turn {turn + 1}" for turn in range(longest))),
            [(*row, *[""] * (longest + 1 - len(row))) for row in rows],
        ),
    )


def _pretraining(lineage: Lineage) -> str:
    lines = []
    for stage in lineage.of("pretrain"):
        validation = stage.step.summary.get("validation") or {}
        bits = validation.get("bits_per_byte", validation.get("validation/bits_per_byte"))
        xz = stage.step.summary.get("xz_bits_per_byte")

        if bits is not None:
            lines.append(
                f"{md.text(stage.name)}: {bits:.3f} bits per byte of held-out text of the same sources"
                + (f" (`xz -9`: {xz:.3f})" if xz is not None else "")
            )

    return md.document("### Pretraining", md.bullets(*lines)) if lines else ""


def _rewards(lineage: Lineage) -> str:
    """Accuracy on held-out comparisons of the reward models the model was made with (Table 8)."""
    rows = []
    for stage in lineage.of("reward"):
        accuracy = stage.step.result(AccuracyResult) or AccuracyResult(sets={})
        for name, of_set in sorted(accuracy.sets.items()):
            degrees_, baselines = of_set.by_degree, of_set.by_baseline
            rows.append(
                (
                    md.text(stage.name),
                    md.text(name),
                    *(_accuracy(degrees_.get(degree)) for degree in DEGREES),
                    _accuracy(of_set.all),
                    *(_accuracy(baselines.get(baseline)) for baseline in BASELINES),
                )
            )

    degrees = (f"{degree} better" if degree != "better" else degree for degree in DEGREES)
    return (
        md.document(
            "### The reward models it was made with",
            "Share of held-out comparisons in which the preferred answer scores higher, by how much better it is. Half is "
            "what guessing gets. Beside it, on the same comparisons, judges that understand nothing: one takes the longer "
            "answer (for safety the shorter), one weighs words without their order.",
            md.table(("Reward model", "Comparisons", *degrees, "all", *BASELINES), rows, (0, 1)),
        )
        if rows
        else ""
    )


def _accuracy(share: Proportion | None) -> str:
    return f"{md.rate(share.model_dump())} of {share.n}" if share else "–"


# ---- safety
# ---------------------------------------------------------------------------------------------------------
def safety(found: Measured | None) -> str:
    """Violations and false refusals, in all and by category."""
    if found is None:
        return md.document("## Safety", NOTHING)

    return md.document(
        "## Safety",
        _bad(found),
        _by_category(found.violations, "Violations by category"),
        _refused(found),
        _by_category(found.false_refusals, "False refusals by category"),
        "`RESPONSIBLE_USE.md` says what follows from this.",
    )


def _bad(found: Measured) -> str:
    overall = found.violation_rate
    if overall is None:
        return "Violations: not measured."

    by = (
        "by ground truth"
        if found.truthful
        else f"by the safety reward model, which gives them a probability of safety below {UNSAFE_BELOW:g}"
    )
    rows = []
    for name in found.versions:
        truth: Mapping[str, Any] = found.content["results"][name].get("truth") or {}
        rows.append(
            (
                md.text(name) if name != found.name else f"**{md.text(name)}, this model**",
                md.rate(truth.get("violations")),
                md.mean(truth.get("refusal_quality")),
                *(md.rate(truth.get(key)) for key in ("false_refusals", "false_refusals_helpful")),
            )
        )

    return md.document(
        f"Of {overall['n']} unsafe prompts this model answered {md.rate(overall)} with a violation, {by}.",
        md.table(
            (
                "Version",
                "Violations, unsafe prompts",
                "Quality of answers to them",
                "Refusals, borderline prompts",
                "Refusals, helpful prompts",
            ),
            rows,
        )
        if found.truthful
        else "",
    )


def _refused(found: Measured) -> str:
    if not found.truthful:
        return "False refusals: not measured, for nobody has told refusals from other answers."

    one: Mapping[str, Any] = found.result["truth"]["false_refusals"]
    return (
        f"Of {one['n']} borderline prompts, which only look unsafe, it refused {md.rate(one)}."
        if one.get("rate") is not None
        else "False refusals: not measured."
    )


def _by_category(found: list[Category], title: str) -> str:
    rows = [
        (md.text(one.key), md.text(one.value), f"{one.failed} of {one.total}", md.rate(one.rate))
        for one in found
    ]
    return (
        md.document(f"### {title}", md.table(("What", "Category", "Count", "Rate"), rows, (0, 1)))
        if rows
        else ""
    )


# ---- for programs
# ------------------------------------------------------------------------------------------------
def index(found: Measured | None, task: str) -> list[dict[str, Any]]:
    """The results of `model-index`: one for each kind of prompt, as huggingface_hub reads them."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for kind, metric in _metrics(found) if found is not None else ():
        kinds.setdefault(kind, []).append(metric)

    name = found.prompts.stem if found is not None and found.prompts is not None else "prompts"
    return [
        {
            "task": {"type": task},
            "dataset": {"type": name, "name": f"held-out {kind} prompts", "config": kind},
            "metrics": metrics,
        }
        for kind, metrics in kinds.items()
    ]


def _metrics(found: Measured) -> Iterator[tuple[str, dict[str, Any]]]:
    truth: Mapping[str, Any] = found.result.get("truth") or {}
    for kind, key, value, metric, name in (
        ("helpful", "helpfulness", "mean", "helpfulness", "Helpfulness (ground truth)"),
        ("unsafe", "violations", "rate", "violation_rate", "Violation rate (ground truth)"),
        (
            "borderline",
            "false_refusals",
            "rate",
            "false_refusal_rate",
            "False-refusal rate (ground truth)",
        ),
    ):
        if truth.get(key, {}).get(value) is not None:
            yield kind, _metric(metric, name, truth[key][value])

    for axis, kind in (("helpful", "helpful"), ("safe", "unsafe")):
        one = (found.result.get("rewards") or {}).get(axis) or {}
        if one.get("mean") is not None:
            yield kind, _metric(f"reward_{axis}", f"Mean reward, {AXES[axis]}", one["mean"])

    for row in found.content.get("win_rates", []):
        if (
            row["version"] == found.name
            and row["rate"] is not None
            and row["against"] == found.versions[0]
        ):
            yield (
                ("helpful" if row["axis"] == "helpful" else "unsafe"),
                _metric(
                    f"win_rate_{row['judge']}",
                    f"Win rate against {row['against']} ({JUDGES[row['judge']]})",
                    row["rate"],
                ),
            )


def _metric(kind: str, name: str, value: float) -> dict[str, Any]:
    return {"type": kind, "name": name, "value": round(float(value), 4)}


def weakest(found: Measured) -> tuple[str, float] | None:
    """The family of helpful prompts that is answered worst."""
    families: Mapping[str, Any] = (found.result.get("truth") or {}).get("families") or {}
    name = min(families, key=lambda each: families[each]["mean"], default=None)
    return None if name is None else (name, families[name]["mean"])
