"""Public data into our records: dialogues (§3.1), comparisons (§3.2.1) and prompts, mixed,
deduplicated and split.

The split is a function of the first user turn alone: the same opening lies on the same side in
every run, whatever its kind, seed or sources, so what is held out of one stage's data is held out
of every other's. The order of the records, and which of them a limit keeps, follow from the seed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from llama2 import records
from llama2.config import Config as Section
from llama2.config import StageConfig
from llama2.data.split import is_heldout, normalize_opening
from llama2.errors import UserError
from llama2.hashing import hash_parts
from llama2.importers.dialogs import import_dialogs
from llama2.importers.preferences import holds_preferences, import_preferences
from llama2.importers.prompts import Family, import_prompts, make_prompt_id
from llama2.importers.tables import Malformed, ReadOptions
from llama2.records import Axis, Dialog, Message, Messages, Preference, Prompt
from llama2.results import PreparedSource, PrepareResult, RecordSizes
from llama2.runs import Run
from llama2.tally import Tally

Record = Dialog | Preference | Prompt
Kind = Literal["dialogs", "preferences", "prompts"]


class RecordSource(Section):
    """One file, directory or archive to take records from."""

    incidental: ClassVar[frozenset[str]] = frozenset({"license"})

    path: Path
    format: str = "auto"
    """the name of a format (docs/data.md); auto: recognised from the first rows of each file"""
    ignore: tuple[str, ...] = ()
    """columns to leave out, where a row means the same without them"""
    axis: Axis | None = None
    """what answers were compared for; empty: as the format says, safe for Anthropic's harmless
    sets, else helpful"""
    safety: bool | None = None
    """the safety tag of all prompts; empty: as the set says"""
    family: Family = ""
    """prompts no one should comply with (unsafe), or that look so and are not (borderline), where
    the set is silent"""
    without: tuple[str, ...] = ()
    """leave out records with one of these phrases in what the assistant says, whatever its case:
    boilerplate that a model would take over"""
    limit: int = Field(0, ge=0)
    """use at most this many records, chosen at random; 0: all"""
    weight: float = Field(1.0, gt=0)
    """how often each training record is written; 2.5 is two or three times, 0.5 every other
    record"""
    malformed: Malformed = "stop"
    """a row that is not in the format ends the run, or is skipped and counted"""
    license: str | None = None
    """its licence, for the papers of a release; nothing depends on it"""


class Config(StageConfig):
    """Turn public data into records. A source is `--sources.NAME.path FILE`; its other keys are in
    docs/data.md."""

    kind: Kind
    """what to make; comparisons can serve as dialogs (the preferred answers) and as prompts,
    dialogs as prompts"""
    sources: dict[str, RecordSource] = {}
    """name of the set -> {path, ...}; the records carry the name as `metadata.source`"""
    heldout: float = Field(0.0, ge=0, lt=1)
    """share of the opening turns that goes to heldout-<kind>.jsonl"""
    exclude: tuple[Path, ...] = ()
    """files of prompts, dialogs or comparisons; what opens one of theirs opens no conversation of
    ours"""
    max_characters: int = Field(0, ge=0)
    """leave out records with more text than this, prompt and longest answer together; 0: no
    limit"""


@dataclass
class _Imported:
    """Records of one source."""

    name: str
    source: RecordSource
    tally: Tally
    train: list[Record] = field(default_factory=list)
    heldout: list[Record] = field(default_factory=list)


def run(config: Config, run: Run) -> None:
    """Write <kind>.jsonl, heldout-<kind>.jsonl if a share is held out, and summary.json."""
    if not run.ranks.is_main:
        return
    if not config.sources:
        raise UserError(
            "there is nothing to prepare: 'sources' is empty",
            "name files: --sources.mine.path FILE",
        )

    excluded: set[str] = set()
    for path in config.exclude:
        prompts = _read("prompts", "", RecordSource(path=path), Tally())
        excluded.update(normalize_opening(_messages(record)) for record in prompts)

    seen: set[str] = set()
    imported = []
    for name, source in config.sources.items():
        imported.append(_import(config, name, source, excluded, seen, run.tally(name)))

    train = _shuffle(
        chain.from_iterable(_repeat(item, config.seed) for item in imported), config.seed
    )
    heldout = _shuffle(chain.from_iterable(item.heldout for item in imported), config.seed)
    if not train or (config.heldout and not heldout):
        lines = "; ".join(f"{item.name}: {item.tally.line()}" for item in imported)
        missing = "record is left to train on" if not train else "record is held out"
        raise UserError(
            f"no {missing}; {lines}", "check the sources, the limits and the held-out share"
        )

    records.write(run.path / f"{config.kind}.jsonl", train)
    if config.heldout:
        records.write(run.path / f"heldout-{config.kind}.jsonl", heldout)

    run.write_result(
        PrepareResult(
            kind=config.kind,
            train=_measure(train),
            heldout=_measure(heldout),
            sources=[_describe(item) for item in imported],
        )
    )


def _import(
    config: Config,
    name: str,
    source: RecordSource,
    excluded: set[str],
    seen: set[str],
    tally: Tally,
) -> _Imported:
    """Import one source: what is too long, excluded or already there is left out, then it is
    limited, then split."""
    wanted: list[Record] = []
    for record in _read(config.kind, name, source, tally):
        reason = _explain_unwanted(config, source, record, excluded, seen)
        if reason:
            tally.skip(reason)
        else:
            seen.add(_identify(record))
            wanted.append(record)

    chosen = _shuffle(wanted, config.seed)[: source.limit or None]
    tally.skip("over the limit", count=len(wanted) - len(chosen))
    tally.kept = len(chosen)

    imported = _Imported(name, source, tally)
    for record in chosen:
        heldout = is_heldout(_messages(record), config.heldout)
        (imported.heldout if heldout else imported.train).append(record)

    return imported


def _explain_unwanted(
    config: Config, source: RecordSource, record: Record, excluded: set[str], seen: set[str]
) -> str:
    """Say why a record is left out; an empty text for one that is wanted."""
    if config.max_characters and _characters(record) > config.max_characters:
        return "too long"
    if normalize_opening(_messages(record)) in excluded:
        return "excluded"
    if any(phrase.lower() in answer for phrase in source.without for answer in _said(record)):
        return "with a phrase of `without`"

    return "duplicate" if _identify(record) in seen else ""


def _read(kind: Kind, name: str, source: RecordSource, tally: Tally) -> Iterator[Record]:
    """Yield the records of one source as `kind`, comparisons turned into dialogs or prompts where
    that is asked for."""
    how = ReadOptions(source.format, source.malformed, source.ignore)
    if kind != "preferences" and not holds_preferences(source.path, source.format):
        if kind == "dialogs":
            yield from import_dialogs(source.path, how, name, tally)
        else:
            yield from import_prompts(source.path, how, source.safety, source.family, name, tally)

        return

    for item in import_preferences(source.path, how, source.axis, name, tally):
        if kind == "preferences":
            yield item
        elif kind == "dialogs":
            yield Dialog(
                (*item.prompt, Message("assistant", item.chosen.text)), metadata=item.metadata
            )
        else:
            metadata = ({"family": source.family} if source.family else {}) | item.metadata
            safety = item.axis == "safe" if source.safety is None else source.safety
            yield Prompt(
                item.prompt,
                make_prompt_id(item.prompt, item.metadata.get("source", "")),
                safety,
                metadata,
            )


def _messages(record: Record) -> Messages:
    return record.prompt if isinstance(record, Preference) else record.messages


def _answers(record: Record) -> tuple[str, ...]:
    if not isinstance(record, Preference):
        return ()

    return tuple(response.text for response in record.responses)


def _said(record: Record) -> tuple[str, ...]:
    """Return all that the assistant says, in lower case."""
    turns = [turn.content for turn in _messages(record) if turn.role == "assistant"]
    return tuple(map(str.lower, (*turns, *_answers(record))))


def _characters(record: Record) -> int:
    """Return the length of the prompt with the longest answer."""
    longest = max(map(len, _answers(record)), default=0)
    return sum(len(message.content) for message in _messages(record)) + longest


def _identify(record: Record) -> str:
    """Return what makes two records the same: all texts and, of a comparison, the axis."""
    turns = [f"{message.role}:{message.content}" for message in _messages(record)]
    axis = record.axis if isinstance(record, Preference) else ""
    return "\0".join([*turns, *sorted(_answers(record)), axis])


def _shuffle(items: Iterable[Record], seed: int) -> list[Record]:
    """Put records in an order that depends on the seed and them alone."""
    keyed = [
        (hash_parts(str(seed), _identify(item)), index, item) for index, item in enumerate(items)
    ]
    return [item for _, _, item in sorted(keyed, key=lambda entry: entry[:2])]


def _repeat(item: _Imported, seed: int) -> Iterator[Record]:
    """Yield every training record as often as its source's weight says, the fraction by chance."""
    times, fraction = divmod(item.source.weight, 1.0)
    for record in item.train:
        extra = hash_parts("weight", str(seed), _identify(record)) < fraction * 2.0**64
        yield from [record] * (int(times) + extra)


def _measure(items: Sequence[Record]) -> RecordSizes:
    """Return the number of records, and quantiles of their length in characters."""
    lengths = sorted(map(_characters, items))
    quantiles = {}
    for share in (10, 50, 90, 99) if lengths else ():
        place = min(len(lengths) - 1, len(lengths) * share // 100)
        quantiles[f"p{share}"] = lengths[place]

    return RecordSizes(
        records=len(lengths), characters=sum(lengths), characters_per_record=quantiles
    )


def _describe(item: _Imported) -> PreparedSource:
    """Return what became of one source."""
    return PreparedSource(
        name=item.name,
        path=str(item.source.path),
        train=len(item.train),
        heldout=len(item.heldout),
        characters_per_record=_measure(item.train).characters_per_record,
        **item.tally.summary(),
    )
