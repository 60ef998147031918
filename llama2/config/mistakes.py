"""Mistakes in a configuration, in plain words: what is wrong, where, and what was probably
meant."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from types import NoneType
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from llama2.config import schema
from llama2.config.schema import NAME, Flag, Place
from llama2.errors import UserError
from llama2.terminal_text import shorten, show_value

_DATA = ("dialogs", "preferences", "shards", "documents", "sources", "prompts", "conversations")
_ALIASES = {
    "lr": ("learning_rate",),
    "data": _DATA,
    "dataset": _DATA,
    "model_name_or_path": ("model", "policy", "checkpoint", "checkpoints"),
    "model": ("policy", "policies", "checkpoint", "checkpoints", "candidate"),
    "output_dir": ("out",),
    "output": ("out",),
    "num_train_epochs": ("epochs",),
    "steps": ("max_steps",),
    "max_length": ("sequence_length", "max_tokens"),
    "max_seq_length": ("sequence_length",),
    "seq_len": ("sequence_length",),
    "max_new_tokens": ("max_tokens",),
    "per_device_train_batch_size": ("micro_batch_size",),
    "bs": ("batch_size",),
    "warmup": ("warmup_steps",),
    "max_grad_norm": ("clip",),
    "grad_clip": ("clip",),
    "bf16": ("precision",),
    "fp16": ("precision",),
    "dtype": ("precision",),
    "fsdp": ("parallel",),
    "num_samples": ("k",),
    "kl_coef": ("beta",),
}
"""what other programs call our keys, the likeliest first"""

OF_DRY_RUNS = ("--ranks", "--gib", "--tflops", "--mfu", "--json")
_URGENCY = {"extra_forbidden": 0, "missing": 2}
"""a misspelt key leaves its right spelling missing as well: the misspelling is the one to name"""
_BOUNDS = {
    "greater_than": ("gt", "must be greater than {}"),
    "greater_than_equal": ("ge", "must be at least {}"),
    "less_than": ("lt", "must be less than {}"),
    "less_than_equal": ("le", "must be at most {}"),
    "too_short": ("min_length", "needs at least {}"),
    "too_long": ("max_length", "takes at most {}"),
}

# --- what was meant ---


def suggest(root: Any, parent: Place, tail: Sequence[str], *, as_flag: bool) -> str:
    """Return `did you mean 'x'?` for the place that `tail`, unknown below `parent`, probably means;
    else the keys known."""
    wanted = [name.replace("-", "_").lower() for name in tail]
    for start in (parent, Place((), root, "")):
        names = _find_meant(start.kind, wanted)
        if names and as_flag:
            flag = ".".join(filter(None, (start.flag, schema.spell_flag(*names))))
            return f"did you mean '--{flag}'?"
        if names:
            return f"did you mean '{'.'.join((*start.names, *names))}'?"

    known = sorted(key for key, _ in schema.list_keys(parent.kind) if key != NAME)
    if as_flag:
        known = [f"--{schema.spell_flag(key)}" for key in known]

    return f"known: {', '.join(known)}"


def _find_meant(start: Any, wanted: Sequence[str]) -> tuple[str, ...]:
    """Return the names of the place below `start` that fits best, () if none does."""
    # of equal names the one least deep
    places = dict(sorted(_places(start), key=lambda place: len(place[0])))
    by_end = {names[-1]: names for names in reversed(places)}

    meant = _match_exactly(list(places), by_end, wanted)
    if not meant:
        beside = [names[0] for names in places if len(names) == 1]
        close = difflib.get_close_matches(wanted[0], beside, n=1, cutoff=0.6)
        close = close or difflib.get_close_matches(wanted[-1], by_end, n=1, cutoff=0.75)
        if not close:
            return ()

        meant = by_end[close[0]]

    if schema.is_section(places[meant]) and len(wanted) == 1:
        return (*meant, *next(schema.list_leaves(places[meant]))[0])

    return meant


def _match_exactly(
    places: Sequence[tuple[str, ...]],
    by_end: Mapping[str, tuple[str, ...]],
    wanted: Sequence[str],
) -> tuple[str, ...]:
    """Return the place that ends in the names wanted or in a name that other programs have for it,
    () if none does."""
    for names in places:
        if list(names[-len(wanted) :]) == list(wanted) and (len(wanted) > 1 or len(names) == 1):
            return names

    called = (wanted[-1], *_ALIASES.get(wanted[-1], ()))
    return min((by_end[name] for name in called if name in by_end), key=len, default=())


def _places(annotation: Any, prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every place below `annotation`, sections included, but none below a name that the user
    chooses."""
    for key, kind in schema.list_keys(annotation):
        if key != NAME:
            yield (*prefix, key), kind
            yield from _places(kind, (*prefix, key))


def explain_unknown_flag(root: Any, flag: Flag, values: Mapping[str, Any]) -> UserError:
    """Return the error for a flag that leads nowhere."""
    if flag.name in OF_DRY_RUNS:
        return UserError(f"unknown flag '{flag.name}'", "it is for a dry run: add --dry-run")

    names = flag.name[2:].split(".")
    known = len(names) - 1
    while (parent := schema.find_place(root, names[:known], values)).kind is None:
        known -= 1

    cure = suggest(root, parent, names[known:], as_flag=True)
    return UserError(f"unknown flag '{flag.name}'", cure)


# --- what is wrong ---


def explain(
    root: type[BaseModel], error: ValidationError, where: str, values: Mapping[str, Any]
) -> UserError:
    """Return the first mistake that pydantic found, as a sentence about the user's key or flag.
    `where` is the file or step it stands in."""
    detail = min(error.errors(), key=lambda detail: _URGENCY.get(detail["type"], 1))
    names, flag = _locate(detail, values)
    place = schema.find_place(root, names, values)
    prefix = f"{where}: " if where and flag is None else ""
    key = ".".join(names)

    if detail["type"] == "extra_forbidden":
        return _explain_unknown_key(root, names, values, prefix)
    if detail["type"] == "missing":
        return UserError(f"{prefix}'{key}' is required", _how_to_give(place, names, where, values))

    value = detail["input"]
    if detail["type"] in ("value_error", "assertion_error"):
        message = detail["msg"].partition(", ")[2] or detail["msg"]
        named = f"'{key}': " if key else ""
        given = "" if isinstance(value, Mapping) else f" (it is {_show(value)})"
        return UserError(f"{prefix}{named}{message}{given}", "mend the value")

    if schema.is_section(place.kind) and not isinstance(value, Mapping):
        return _explain_no_section(place, flag, value, prefix)

    named = flag.name if flag else key
    given = flag.spell() if flag and len(flag.words) == 1 else _show(value)
    rule, cure = _describe_rule(detail, place.kind)
    return UserError(f"{prefix}'{named}': {rule} (it is {given})", cure)


def _locate(detail: ErrorDetails, values: Any) -> tuple[tuple[str, ...], Flag | None]:
    """Return the place an error is about, without the alternatives of a union, and the flag that
    stands there, if one does."""
    names: list[str] = []
    for part in detail["loc"]:
        is_index = isinstance(values, (list, tuple)) and isinstance(part, int)
        if not is_index and not (isinstance(values, Mapping) and part in values):
            break

        values = values[part]
        names.append(str(part))

    if detail["type"] == "missing":
        names.append(str(detail["loc"][-1]))

    return tuple(names), values if isinstance(values, Flag) else None


def _explain_unknown_key(
    root: type[BaseModel], names: tuple[str, ...], values: Mapping[str, Any], prefix: str
) -> UserError:
    key = ".".join(names)
    dotted = schema.find_place(root, [*names[:-1], *names[-1].split(".")], {})
    if dotted.kind is not None:
        return UserError(
            f"{prefix}'{key}': a key of a recipe has no dots",
            f"write {_nest(dotted.names, schema.spell_metavar(dotted.kind))}",
        )

    parent = schema.find_place(root, names[:-1], values)
    cure = suggest(root, parent, names[-1:], as_flag=False)
    return UserError(f"{prefix}unknown key '{key}'", cure)


def _how_to_give(place: Place, names: Sequence[str], where: str, values: Any) -> str:
    """Return the flag that gives a required key, or the entry that was meant, if another of almost
    this name is there."""
    for name in names[:-2]:
        values = values.get(name) if isinstance(values, Mapping) else None

    if len(names) > 2 and isinstance(values, Mapping):
        others = [name for name in values if name != names[-2]]
        close = difflib.get_close_matches(names[-2], others, n=1, cutoff=0.8)
        if close:
            return f"did you mean '{'.'.join((*names[:-2], close[0], names[-1]))}'?"

    usage = f"--{schema.spell_flag(*names)}" if place.kind is None else schema.show_usage(place)
    if where.startswith("steps."):
        usage = f"--{where}.{usage[2:]}"

    return f"give {usage} or set it in the recipe"


def _explain_no_section(place: Place, flag: Flag | None, value: Any, prefix: str) -> UserError:
    """Return the error for a value where keys are wanted."""
    below, kind = next(schema.list_leaves(place.kind), ((), None))
    is_named = below[:1] == (NAME,)
    if flag and is_named:
        return UserError(
            f"{prefix}'{flag.name}' needs a name for what it is given (it is {flag.spell()})",
            f"use --{place.flag}.{schema.spell_flag(*below)} {flag.spell()}",
        )
    if flag:
        return UserError(
            f"{prefix}'{flag.name}' has keys of its own (it is {flag.spell()})",
            f"use {schema.show_usage(place)}",
        )

    inner = schema.spell_metavar(kind)
    if is_named and not isinstance(value, (list, tuple)):
        inner = _show(value)
    if below:
        inner = f"{{{_nest(below, inner)}}}"

    return UserError(
        f"{prefix}'{'.'.join(place.names)}' is a mapping (it is {_show(value)})",
        f"write {place.names[-1]}: {inner}" if place.names else "write `key: value` lines",
    )


def _nest(names: Sequence[str], value: str) -> str:
    """Return `a: {b: value}`."""
    *above, last = names
    text = f"{last}: {value}"
    for name in reversed(above):
        text = f"{name}: {{{text}}}"

    return text


def _describe_rule(detail: ErrorDetails, kind: Any) -> tuple[str, str]:
    """Return what a value must be, and the cure."""
    cure = "mend the value"
    if detail["type"] in _BOUNDS:
        name, text = _BOUNDS[detail["type"]]
        return text.format(_show(detail["ctx"][name])), cure
    if detail["type"] == "finite_number":
        return "must be a finite number", cure

    indices = [part for part in detail["loc"] if isinstance(part, int)]
    if indices and schema.find_lists(kind):  # an error inside of a list is about its items
        kind = schema.find_item_type(schema.find_lists(kind)[0], indices[-1])

    if detail["type"] == "literal_error":
        return f"must be {schema.describe_type(kind)}", cure

    value, kinds = detail["input"], schema.list_types(kind)
    if str in kinds and isinstance(value, (bool, int, float)):
        cure = "put it in quotes"
    elif bool in kinds and str not in kinds:
        cure = "write true or false"
    elif schema.takes_several(kind) and not isinstance(value, (Mapping, list, tuple)):
        cure = f"write [{_show(value)}]"

    return f"{schema.describe_type(kind)} is wanted", cure


def _show(value: Any) -> str:
    """Return a value as it is written in a recipe, the beginning of a long one."""
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, (bool, NoneType)):
        return json.dumps(value)
    if isinstance(value, float):
        return f"{value:g}"
    if not isinstance(value, (list, tuple)):
        return show_value(value)

    return shorten(f"[{', '.join(map(_show, value))}]")
