"""How often a finished reward model is right about comparisons that were kept apart (§3.2.2, Tables
7 and 8), beside judges that understand nothing.

The comparisons come in any format that `prepare` reads. A set of several sources is measured whole
and source by source. The bag of words is the one fitted to the model's own training pairs, which
`reward` leaves beside the model, unless other pairs are given to fit it to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field

from llama2 import records
from llama2.config import Config as Section
from llama2.config import StageConfig
from llama2.data.split import normalize_opening
from llama2.devices import Precision
from llama2.errors import UserError
from llama2.evaluate.baselines import BagOfWords
from llama2.formats import checkpoint
from llama2.hashing import hash_parts
from llama2.importers.preferences import import_preferences
from llama2.importers.tables import Malformed, ReadOptions
from llama2.records import Axis, Preference
from llama2.results import JudgedPairsResult, ReadCounts, SetAccuracy, WordWeights
from llama2.runs import Run
from llama2.runs.parts import work_in_parts
from llama2.runs.recipe_runs import read_manifest, read_result
from llama2.stages.common.answers import check_judge, load_judge, load_when_needed
from llama2.stages.common.planning import Cluster, PlannedRuns, plan_judging
from llama2.stages.common.reward_accuracy import (
    describe_accuracies,
    mark_pairs,
    measure_sets,
    warn_of_chance,
)
from llama2.stages.common.reward_pairs import EncodedPair, Encoder, warn_of_trained

POSITIONAL = "model"
PART = 256
"""pairs that are scored between two looks at the disk"""


class PairSource(Section):
    """Comparisons to judge by, in any format that `prepare` reads."""

    incidental: ClassVar[frozenset[str]] = frozenset({"license"})

    path: Path
    """a file, a directory or an archive"""
    format: str = "auto"
    """the name of a format (docs/data.md); auto: recognised from the first rows of each file"""
    ignore: tuple[str, ...] = ()
    """columns to leave out, where a row means the same without them"""
    axis: Axis | None = None
    """what answers were compared for; empty: as the format says, safe for Anthropic's harmless
    sets, else helpful"""
    malformed: Malformed = "stop"
    """a row that is not in the format ends the run, or is skipped and counted"""
    license: str | None = None
    """its licence, for the papers of a release; nothing depends on it"""


class Config(StageConfig):
    """Judge a finished reward model by comparisons it has not seen."""

    model: Path
    """a reward model"""
    pairs: Annotated[dict[str, PairSource], Field(min_length=1)]
    """name -> comparisons; one name for several sources is measured source by source too"""
    training_pairs: dict[str, PairSource] = {}
    """name -> comparisons to fit the bag of words to; without any it is the one that was fitted
    when the model was trained"""
    max_tokens: int | None = Field(None, gt=1)
    """longer conversations are left out and counted; without it the model's context decides"""
    precision: Precision = "bf16"
    """of the products"""


def plan(config: Config, cluster: Cluster, planned: PlannedRuns) -> dict[str, Any]:
    """Return memory: the reward model and one batch."""
    shape = planned.shape(config.model)
    return plan_judging([], [shape], config.precision, 1, 1, cluster)


def run(config: Config, run: Run) -> None:
    """Write accuracy.json: by set, source and degree, beside the baselines."""
    check_judge(config.model)
    context = checkpoint.config_of(config.model).max_position_embeddings
    most = context if config.max_tokens is None else config.max_tokens
    encoder = Encoder(checkpoint.open_tokenizer(config.model), most, context)
    sets = {name: read_set(source, encoder, run, name) for name, source in config.pairs.items()}
    sets = {name: pairs for name, pairs in sets.items() if pairs}
    if not sets:
        counts = "; ".join(f"{name}: {tally.line()}" for name, tally in run.tallies.items())
        raise UserError(f"no pair is left to judge by: {counts}", "mend the data, or give other")

    words = load_words(config, encoder, run) if run.ranks.is_main else None
    for line in warn_of_trained(read_trained(config.model), sets, "pairs."):
        run.warn(line)

    marks = mark_sets(config, run, sets)
    accuracies = measure_sets(sets, marks, words)
    run.write_result(
        JudgedPairsResult(
            reward_model=config.model.resolve().name,
            sets=accuracies,
            read={name: ReadCounts.of(tally) for name, tally in run.tallies.items()},
        )
    )
    conclude(run, sets, accuracies)


def read_set(source: PairSource, encoder: Encoder, run: Run, name: str) -> list[EncodedPair]:
    """Return the pairs of a set in token ids; those left out are counted."""
    tally = run.tally(name)
    how = ReadOptions(source.format, source.malformed, source.ignore)
    preferences = list(import_preferences(source.path, how, source.axis, tally=tally))
    tally.kept = 0  # the encoder counts those that it keeps
    return encoder.encode(preferences, tally)


def load_words(config: Config, encoder: Encoder, run: Run) -> BagOfWords | None:
    """Return the bag of words to measure beside the model, and warn where there is none."""
    if config.training_pairs:
        pairs: list[EncodedPair] = []
        for name, source in config.training_pairs.items():
            pairs += read_set(source, encoder, run, f"training_pairs.{name}")

        return BagOfWords.fit([pair.texts for pair in pairs])

    stored = read_result(config.model, WordWeights)
    if stored is None:
        run.warn(
            f"{config.model / WordWeights.file}: there is none, so no bag of words is measured "
            "beside the model; --training-pairs.NAME.path FILE fits one"
        )
        return None

    return BagOfWords.load(stored)


def read_trained(model: Path) -> set[int]:
    """Return how the conversations open that a reward model was trained on, as far as its run
    knows where they lie."""
    openings: set[int] = set()
    config = read_manifest(model).get("config") or {}
    for source in (config.get("preferences") or {}).values():
        path = Path(str(source.get("path")))
        if path.is_file():
            for preference in records.read(Preference, path, may_be_empty=True):
                openings.add(hash_parts(normalize_opening(preference.prompt)))

    return openings


def mark_sets(
    config: Config, run: Run, sets: Mapping[str, Sequence[EncodedPair]]
) -> dict[str, list[float]]:
    """Return 1 for each pair of each set about which the model is right, in parts that are kept."""
    device = run.ranks.device
    marks = {}
    with load_when_needed(
        lambda: load_judge(config.model, config.precision, device), device
    ) as scorer:

        def work(part: Sequence[EncodedPair], first: int) -> list[float]:
            return mark_pairs(scorer(), part, config.precision, run.ranks, name=config.model)

        for place, (name, pairs) in enumerate(sets.items()):
            marks[name] = list(work_in_parts(run, f"pairs-{place}", pairs, PART, work))

    return marks


def conclude(
    run: Run, sets: Mapping[str, Sequence[EncodedPair]], accuracies: Mapping[str, SetAccuracy]
) -> None:
    """Have all accuracies said at the end, and warn of those that prove nothing."""
    for line in describe_accuracies(sets, accuracies):
        run.conclude(line)

    for name in sets:
        for line in warn_of_chance(name, accuracies[name]):
            run.warn(line)
