"""Sections of the report on the stages: data, pretraining, fine-tuning, reward models, and how the
policy was tuned.

Each function returns one section in the paper's order, empty where the recipe has no such step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llama2 import json_files
from llama2.evaluate.judges import KINDS
from llama2.records import DEGREES
from llama2.report import paper_values
from llama2.report.charts import Series, bars, lines
from llama2.report.html import (
    Html,
    clock,
    details,
    figure,
    figures,
    join,
    number,
    paragraph,
    percent,
    section,
    short,
    table,
    talk,
)
from llama2.report.targets import BASELINES, accuracies, axis_of, own_set
from llama2.runs.recipe_runs import Recipe, Step

Part = Html


def data(recipe: Recipe) -> Part:
    """§2.1: what went in, what was dropped, and the tokens it became."""
    parts = [_world(step) for step in recipe.of("world")] + [
        _imported(step) for step in recipe.of("prepare")
    ]
    for step in recipe.of("clean"):
        parts.append(_cleaned(step))

    for step in recipe.of("tokenizer"):
        if "vocab_size" in step.summary:
            parts.append(
                paragraph(
                    f"{step.name}: {number(step.summary['vocab_size'])} pieces (the paper: 32,000)."
                )
            )

    for step in recipe.of("tokenize"):
        rows = [
            (
                split,
                *(number(counts.get(key), 9) for key in ("documents", "tokens", "bytes")),
                f"{counts['bytes'] / counts['tokens']:.2f}" if counts.get("tokens") else "",
            )
            for split, counts in step.summary.items()
            if isinstance(counts, dict)
        ]
        if rows:
            parts.append(table((step.name, "Documents", "Tokens", "Bytes", "Bytes a token"), rows))

    return section("data", "§2.1", "Data and tokenizer", *parts)


def _world(step: Step) -> Html:
    """Records by file; those of one directory in one sum."""
    sums: dict[str, float] = {}
    for name, count in step.summary.items():
        if isinstance(count, (int, float)):
            group = name.split("/")[0].removesuffix(".jsonl")
            sums[group] = sums.get(group, 0) + count

    shown = ", ".join(f"{name} {number(count)}" for name, count in sums.items())
    return paragraph(f"{step.name}: {shown}.") if shown else Html("")


def _imported(step: Step) -> Html:
    rows = []
    for source in step.summary.get("sources", []):
        skipped = source.get("skipped") or {}
        why = (
            ", ".join(f"{number(count)} {reason}" for reason, count in skipped.items() if count)
            if isinstance(skipped, dict)
            else str(skipped)
        )
        rows.append(
            (
                source.get("name", ""),
                number(source.get("train")),
                number(source.get("heldout")),
                why,
            )
        )

    headers = (f"{step.name} ({step.summary.get('kind', '')})", "Taken", "Held out", "Left out")
    return table(headers, rows, words=(0, 3)) if rows else Html("")


_KEPT = ("documents", "kept", "held out", "bytes")


def _cleaned(step: Step) -> Html:
    sources = step.summary.get("sources", {})
    rows = [
        (
            name,
            *(number(counts.get(key, 0), 9) for key in _KEPT),
            ", ".join(
                f"{number(count)} {what}"
                for what, count in counts.items()
                if what not in _KEPT and count
            ),
        )
        for name, counts in sources.items()
    ]
    headers = (step.name, "Documents", "Kept", "Held out", "Bytes", "What cleaning did")

    return table(headers, rows, words=(0, 5)) if rows else Html("")


def paragraph_text(text: str) -> str:
    """Escaped text without a paragraph around it."""
    return str(join([paragraph(text)])).removeprefix("<p>").removesuffix("</p>")


def pretraining(recipe: Recipe) -> Part:
    """§2.2: loss (Figure 5), bits per byte, speed."""
    parts = [Html("")]
    for step in recipe.of("pretrain"):
        summary, validation = step.summary, step.summary.get("validation") or {}
        bits = _either(validation, "bits_per_byte")
        facts = [
            f"{short(summary.get('parameters'))} parameters" if "parameters" in summary else "",
            f"{short(summary.get('tokens'))} tokens" if "tokens" in summary else "",
            f"{bits:.3f} bits per byte on held-out text" if bits is not None else "",
            f"xz -9 of the same text: {summary['xz_bits_per_byte']:.3f}"
            if "xz_bits_per_byte" in summary
            else "",
            *_speed(step),
        ]
        parts += [
            paragraph(f"{step.name}: " + ", ".join(fact for fact in facts if fact) + "."),
            figures(
                _loss(
                    [step],
                    "Loss, nats a token",
                    "Figure 5 ends at 1.74 / 1.67 / 1.57 / 1.50 after 2T tokens (7B / 13B / 34B / 70B).",
                ),
                _bits(step),
                _curve(step, "perf/tokens_per_second", "Tokens a second"),
                _curve(step, "train/grad_norm", "Gradient norm, before clipping at 1.0"),
            ),
        ]

    return section("pretraining", "§2.2", "Pretraining", *parts)


def _speed(step: Step) -> list[str]:
    tokens, mfu = step.series("perf/tokens_per_second")[1], step.series("perf/mfu")[1]
    return [
        f"{short(sum(tokens) / len(tokens))} tokens/s" if tokens else "",
        f"MFU {percent(sum(mfu) / len(mfu), 0)}" if mfu else "",
    ]


def _either(values: Mapping[str, Any], name: str) -> float | None:
    value = values.get(name, values.get(f"validation/{name}"))
    return None if value is None else float(value)


def _loss(steps: Sequence[Step], title: str, note: str = "") -> Html:
    series = []
    for step in steps:
        for key, name in (("train/loss", "training"), ("validation/loss", "held out")):
            x, y = step.series(key)
            if y and not (len(steps) > 1 and key == "validation/loss"):
                series.append(
                    Series(step.name if len(steps) > 1 else name, x, y, markers=key != "train/loss")
                )

    return figure(lines(series, "step", "", noisy=True), title, note) if series else Html("")


def _bits(step: Step) -> Html:
    x, y = step.series("validation/bits_per_byte")
    xz = step.summary.get("xz_bits_per_byte")
    level = ("xz -9", float(xz)) if xz is not None else None

    return (
        figure(
            lines([Series("held out", x, y, markers=True)], "step", "", level=level),
            "Bits per byte of held-out text",
        )
        if y
        else Html("")
    )


def _curve(step: Step, key: str, title: str, small: bool = False) -> Html:
    """One metric over the steps."""
    x, y = step.series(key)
    if len(y) < 2:
        return Html("")

    width, height = (2.6, 1.8) if small else (5.0, 3.1)
    share = key.endswith(("accuracy", "rate", "fraction"))
    return figure(
        lines(
            [Series(step.name, x, y)],
            "step",
            "",
            noisy=True,
            percent=share,
            width=width,
            height=height,
        ),
        title,
    )


def fine_tuning(recipe: Recipe) -> Part:
    """§3.1: all supervised runs, those on sampled answers included."""
    steps = recipe.of("sft")
    rows = []
    for step in steps:
        _, loss = step.series("train/loss")
        validation = step.summary.get("validation") or {}
        rows.append(
            (
                step.name,
                number(step.summary.get("dialogs")),
                short(step.summary.get("tokens")),
                f"{loss[0]:.3f} → {loss[-1]:.3f}" if loss else "",
                number(_either(validation, "loss"), 4),
                clock(step.seconds),
            )
        )

    if not rows:
        return Html("")

    chart = _loss(steps, "Training loss on answers, nats a token")
    headers = ("Run", "Dialogs", "Tokens", "Training loss", "Held-out loss", "Time")
    return section(
        "sft",
        "§3.1",
        "Supervised fine-tuning",
        table(headers, rows),
        figures(chart),
        paragraph(
            "The paper: 27,540 annotations, 2 epochs, loss on answers only. Runs after the first "
            "learn from sampled answers (§3.2.3, §3.3, §4.2.4).",
            "note",
        ),
    )


def preferences(recipe: Recipe) -> Part:
    """§3.2.1: what the annotators said, beside Figure 25 and the three safety bins."""
    steps = [step for step in recipe.of("collect") if step.summary]
    if not steps:
        return Html("")

    labels = ("preferred_only", "both", "neither")
    rows: list[list[Any]] = []
    for step in steps:
        degrees, bins = (
            _shares(step.summary.get("degrees", {})),
            _shares(step.summary.get("safety", {})),
        )
        rows.append(
            [
                step.name,
                number(step.summary.get("pairs")),
                number(step.summary.get("dropped")),
                *(percent(degrees.get(name), 0) for name in DEGREES),
                *(percent(bins.get(name), 0) for name in labels),
            ]
        )

    rows.append(
        [
            "paper, batch 14 (Fig. 25, read off)",
            "",
            "",
            *(percent(paper_values.DEGREES[name][1], 0) for name in DEGREES),
            *(percent(paper_values.SAFETY_BINS[name], 0) for name in labels),
        ]
    )
    headers = ("Run", "Pairs", "Dropped", *DEGREES, "only chosen safe", "both safe", "neither safe")
    return section("preferences", "§3.2.1", "Preferences", table(headers, rows))


def _shares(counts: Mapping[str, float]) -> dict[str, float]:
    total = sum(counts.values())
    return {name: count / total for name, count in counts.items()} if total else {}


def reward_models(recipe: Recipe) -> Part:
    """§3.2.2: accuracy on held-out pairs by degree, beside Table 8."""
    charts: list[Html] = []
    rows: list[list[Any]] = []
    for step in recipe.of("reward"):
        own = own_set(step)
        for name, by in accuracies(step).items():
            known = by.get("baselines", {})
            rows.append(
                [
                    f"{step.name} on {name}",
                    *(_share(by.get(degree)) for degree in (*DEGREES, "all")),
                    *(_share(known.get(key)) for key in BASELINES),
                ]
            )
            printed = paper_values.REWARD_ACCURACY.get(axis_of(step.name) or "", {}).get(
                axis_of(name) or ""
            )

            if printed:
                rows.append(
                    [
                        Html("<i>paper, 70B, Table 8</i>"),
                        *(percent(share) for share in printed),
                        "",
                        "",
                    ]
                )

            if name == own:
                charts.append(_degrees(step, name, by, printed))

        curve = _curve(step, "reward/accuracy", f"{step.name}: accuracy on training pairs")
        charts += [curve] if curve else []

    if not rows and not charts:
        return Html("")

    headers = ["Reward model on held-out set", *DEGREES, "all", "by length", "bag of words"]
    # runs of an earlier version measured no baselines
    if not any(row[-1] or row[-2] for row in rows):
        headers, rows = headers[:-2], [row[:-2] for row in rows]

    return section(
        "reward",
        "§3.2.2",
        "Reward models",
        table(headers, rows) if rows else Html(""),
        figures(*charts),
        paragraph(
            "Accuracy: the preferred answer scores higher. Small figures: number of pairs; whiskers: "
            "95 % (Wilson). Beside it, on all pairs of the set, judges that understand nothing: one "
            "takes the longer answer (for safety the shorter), one weighs words without their order, "
            "learnt from the same pairs."
            if len(headers) > len(DEGREES) + 2
            else "Accuracy: the preferred answer scores higher. Small figures: number of pairs; whiskers: "
            "95 % (Wilson).",
            "note",
        ),
    )


def _share(one: Mapping[str, float] | None) -> Html | str:
    if not one:
        return ""

    return Html(f'{percent(one["accuracy"])} <span class="marks">{number(one["n"])}</span>')


def _degrees(step: Step, name: str, by: Mapping[str, Any], printed: Sequence[float] | None) -> Html:
    found = [degree for degree in DEGREES if degree in by]
    if not found:
        return Html("")

    series = [
        Series(
            "ours",
            found,
            [by[d]["accuracy"] for d in found],
            [by[d]["low"] for d in found],
            [by[d]["high"] for d in found],
        )
    ]
    if printed:
        series.append(
            Series("paper (Table 8)", found, [printed[DEGREES.index(d)] for d in found], paper=True)
        )

    return figure(
        bars(series, "accuracy", bounds=(0.3, 1.0), level=0.5),
        f"{step.name}: accuracy on {name} by degree",
    )


def rejection(recipe: Recipe) -> Part:
    """§3.2.3: best and median of k samples (Figure 7), the temperature search (Figure 8)."""
    parts = []
    for step in recipe.of("rejection"):
        curves, charts = step.read("curves.json"), []
        if curves.get("k"):
            series = [
                Series(name, curves["k"], curves[key], markers=True)
                for key, name in (("max", "best"), ("median", "median"))
                if curves.get(key)
            ]
            charts.append(
                figure(
                    lines(series, "samples k", "reward"),
                    f"{step.name}: reward of k samples",
                    "Figure 7, read off: the median stays at 0.54, the best of 20 reaches 0.67.",
                )
            )

        searched = curves.get("temperatures") or {}
        if len(searched) > 1:
            order = sorted(searched, key=float)
            charts.append(
                figure(
                    lines(
                        [
                            Series(
                                "best",
                                [float(t) for t in order],
                                [searched[t] for t in order],
                                markers=True,
                            )
                        ],
                        "temperature",
                        "mean score of the best",
                    ),
                    f"{step.name}: temperature search",
                    "The paper's best temperature for an RLHF model is 1.2 to 1.3 (Figure 8).",
                )
            )

        facts = [
            f"{number(step.summary.get('prompts'))} prompts",
            f"K = {step.summary.get('k', '?')}",
            f"{number(step.summary.get('kept'))} answers kept",
        ]
        facts += (
            [f"{number(step.summary['earlier'])} from earlier rounds"]
            if step.summary.get("earlier")
            else []
        )
        facts += (
            [f"temperature {step.summary['temperature']:g}"]
            if "temperature" in step.summary
            else []
        )
        parts.append(paragraph(f"{step.name}: {', '.join(facts)}.") if step.summary else Html(""))
        parts.append(figures(*charts))
        examples = [
            join(
                [
                    talk(
                        [
                            ("user", one["prompt"]),
                            (f"worst {one['worst_reward']:.2f}", one["worst"]),
                            (f"best {one['best_reward']:.2f}", one["best"]),
                        ]
                    )
                ]
            )
            for one in step.summary.get("examples", [])
        ]
        parts.append(
            details(f"{step.name}: best and worst samples", join(examples))
            if examples
            else Html("")
        )

    return section("rejection", "§3.2.3", "Rejection sampling", *parts)


PPO_CHARTS = (
    ("KL to the initial policy, nats", "ppo/kl_reference"),
    ("Entropy, nats", "ppo/entropy"),
    ("Clip fraction", "ppo/clip_fraction"),
    ("Explained variance", "ppo/explained_variance"),
    ("Policy's gradient norm", "ppo/actor_grad_norm"),
    ("Critic's gradient norm", "ppo/critic_grad_norm"),
    ("Answer length, tokens", "ppo/length"),
    ("Answers that end", "ppo/eos_rate"),
    ("Reward, helpfulness", "reward/helpfulness"),
    ("Reward, safety", "reward/safety"),
    ("Reward, combined", "reward/mean"),
    ("Correlation of reward and length", "reward/length_correlation"),
)


def ppo(recipe: Recipe) -> Part:
    """§3.2.3: the health of the reinforcement-learning runs, with every alarm and its remedy."""
    parts = []
    for step in recipe.of("ppo"):
        charts = [
            chart for title, key in PPO_CHARTS if (chart := _curve(step, key, title, small=True))
        ]
        health = step.read("health.json")
        alarms = health.get("alarms", [])

        if not charts and not health:
            continue

        parts.append(Html(f"<h3>{paragraph_text(step.name)}</h3>"))
        parts.append(
            table(
                ("Alarm", "Step", "Value", "Cause", "Remedy"),
                [
                    (
                        a.get("name", ""),
                        a.get("step", ""),
                        number(a.get("value")),
                        a.get("cause", ""),
                        a.get("remedy", ""),
                    )
                    for a in alarms
                ],
                words=(0, 3, 4),
            )
            if alarms
            else paragraph(
                "No alarm: KL, entropy, clipping, value function, length and endings stayed healthy."
                if health
                else ""
            )
        )
        parts += [figures(*charts, small=True), figures(_heldout(step))]
        samples = [
            talk(
                [
                    ("user", _last_turn(one.get("prompt", ""))),
                    (f"reward {number(one.get('reward'))}", str(one.get("answer", ""))),
                ]
            )
            for one in health.get("samples", [])[:12]
        ]
        parts.append(details(f"{step.name}: samples", join(samples)) if samples else Html(""))

    return section("ppo", "§3.2.3", "PPO", *parts)


def _heldout(step: Step) -> Html:
    """Reward on held-out prompts, in all and by kind of prompt: what early stopping watches."""
    keys = [
        key
        for key in ("heldout/reward", *(f"heldout/{kind}" for kind in KINDS))
        if len(step.series(key)[1]) > 1
    ]
    series = [
        Series(key.removeprefix("heldout/").replace("reward", "mean"), *step.series(key))
        for key in keys
    ]
    if not series:
        return Html("")

    return figure(lines(series, "step", ""), "Reward on held-out prompts, by kind")


def _last_turn(prompt: Any) -> str:
    """The user's last words of a prompt, given as text or as messages."""
    if isinstance(prompt, list) and prompt:
        last = prompt[-1]
        return str(last.get("content", last) if isinstance(last, dict) else last[-1])

    return str(prompt)


def examples_of(step: Step) -> Html:
    """The example dialogs or answers a step put into its summary."""
    shown = []
    for one in step.summary.get("examples", []):
        example = json_files.parsed(one) if isinstance(one, str) and one.startswith("{") else one
        if isinstance(example, dict) and "messages" in example:
            shown.append(talk([(m["role"], m["content"]) for m in example["messages"]]))
        elif isinstance(example, dict) and "prompt" in example:
            others = [(name, str(text)) for name, text in example.items() if name != "prompt"]
            shown.append(talk([("user", _last_turn(example["prompt"])), *others]))

    return details(f"{step.name}: examples", join(shown)) if shown else Html("")
