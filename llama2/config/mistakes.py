"""Mistakes in a configuration, in plain words: what is wrong, where, and what was probably
meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from llama2.config import schema
from llama2.config.schema import Flag, Place
from llama2.errors import UserError

_ALIASES = {
    "lr": ("learning_rate",),
    "data": (
        "dialogs",
        "preferences",
        "shards",
        "documents",
        "sources",
        "prompts",
        "conversations",
    ),
    "dataset": (
        "dialogs",
        "preferences",
        "shards",
        "documents",
        "sources",
        "prompts",
        "conversations",
    ),
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

# --- what was meant
# --------------------------------------------------------------------------------------------------


def suggestion(root: Any, parent: Place, tail: Sequence[str], *, as_flag: bool) -> str:
    """`did you mean 'x'?` for the place that `tail`, unknown below `parent`, probably means; else
    the keys known."""
    wanted = [name.replace("-", "_").lower() for name in tail]
    for start in (parent, Place((), root, "")):
        found = _meant(start, wanted)
        if found is not None:
            names, flag = found
            return f"did you mean '{f'--{flag}' if as_flag else '.'.join(names)}'?"

    known = sorted(key for kind in schema.models(parent.kind) for key in _keys(kind))
    return f"known: {', '.join(f'--{schema.dashed(key)}' if as_flag else key for key in known)}"


def _meant(start: Place, wanted: Sequence[str]) -> tuple[tuple[str, ...], str] | None:
    """Names and flag of the place below `start` that fits best, if any does."""
    pool = sorted(_places(start.kind), key=lambda place: len(place[0]))
    # of equal names the one least deep
    ends = {names[-1]: (names, kind) for names, kind in reversed(pool)}
    called = [name for name in (wanted[-1], *_ALIASES.get(wanted[-1], ())) if name in ends]
    found = next(
        (
            (names, kind)
            for names, kind in pool
            if list(names[-len(wanted) :]) == list(wanted) and (len(wanted) > 1 or len(names) == 1)
        ),
        None,
    )
    found = found or min(
        (ends[name] for name in called), key=lambda place: len(place[0]), default=None
    )
    beside = [names[0] for names, _ in pool if len(names) == 1]

    for near, cutoff in ((beside, 0.6), (list(ends), 0.75)):
        close = difflib.get_close_matches(
            wanted[0] if near is beside else wanted[-1], near, n=1, cutoff=cutoff
        )
        found = found or (ends[close[0]] if close else None)

    if found is None:
        return None

    names, kind = found
    below: tuple[str, ...] = (
        next(schema.leaves(kind))[0] if schema.is_section(kind) and len(wanted) == 1 else ()
    )
    return (
        (*start.names, *names, *below),
        ".".join(filter(None, (start.flag, schema.dashed(*names, *below)))),
    )


def _places(annotation: Any, prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every place below `annotation`, sections included, but none below a name that the user
    chooses."""
    for kind in schema.models(annotation):
        for name, field in kind.model_fields.items():
            names = (*prefix, schema.key_of(name, field))
            yield names, field.annotation
            yield from _places(field.annotation, names)


def _keys(kind: type[BaseModel]) -> list[str]:
    return [schema.key_of(name, field) for name, field in kind.model_fields.items()]


def unknown_flag(root: Any, flag: Flag, values: Mapping[str, Any]) -> UserError:
    """A flag that leads nowhere."""
    if flag.name in OF_DRY_RUNS:
        return UserError(f"unknown flag '{flag.name}'", "it is for a dry run: add --dry-run")

    names = flag.name[2:].split(".")
    known = next(
        count
        for count in range(len(names) - 1, -1, -1)
        if schema.find(root, names[:count], values).kind is not None
    )
    parent = schema.find(root, names[:known], values)

    return UserError(
        f"unknown flag '{flag.name}'", suggestion(root, parent, names[known:], as_flag=True)
    )


# --- what is wrong
# ---------------------------------------------------------------------------------------------------


def explained(
    root: type[BaseModel], detail: ErrorDetails, where: str, values: Mapping[str, Any]
) -> UserError:
    """What pydantic found, as a sentence about the user's key or flag. `where` is the file or step
    it stands in."""
    names, given = _place(detail, values)
    place = schema.find(root, names, values)
    prefix = f"{where}: " if where and given is None else ""
    key = ".".join(names)

    if detail["type"] == "extra_forbidden":
        parent = schema.find(root, names[:-1], values)
        inside = schema.find(root, [*names[:-1], *names[-1].split(".")], {})
        if inside.kind is not None:  # as a flag has it
            return UserError(
                f"{prefix}'{key}': a key of a recipe has no dots",
                f"write {_nested(inside.names, schema.metavar(inside.kind))}",
            )

        return UserError(
            f"{prefix}unknown key '{key}'", suggestion(root, parent, names[-1:], as_flag=False)
        )

    if detail["type"] == "missing":
        return UserError(f"{prefix}'{key}' is required", _how_to_give(place, names, where, values))

    if detail["type"] in ("value_error", "assertion_error"):
        message = detail["msg"].partition(", ")[2] or detail["msg"]
        shown = (
            "" if isinstance(detail["input"], Mapping) else f" (it is {_shown(detail['input'])})"
        )
        named = f"'{key}': " if key else ""

        return UserError(f"{prefix}{named}{message}{shown}", "mend the value")

    if schema.is_section(place.kind) and not isinstance(detail["input"], Mapping):
        return _no_section(place, given, detail["input"], prefix)

    named = f"'{given.name}'" if given else f"'{key}'"
    shown = given.typed() if given and len(given.words) == 1 else _shown(detail["input"])
    what, cure = _rule(detail, place.kind)

    return UserError(f"{prefix}{named}: {what} (it is {shown})", cure)


def _place(detail: ErrorDetails, values: Any) -> tuple[tuple[str, ...], Flag | None]:
    """The place an error is about, without the alternatives of a union, and the flag that stands
    there, if one does."""
    names: list[str] = []
    for part in detail["loc"]:
        inside = isinstance(values, Mapping) and part in values
        if not inside and not (isinstance(values, (list, tuple)) and isinstance(part, int)):
            break

        values = values[part]
        names.append(str(part))

    if detail["type"] == "missing":
        names = [*names, str(detail["loc"][-1])]

    return tuple(names), values if isinstance(values, Flag) else None


def _how_to_give(place: Place, names: Sequence[str], where: str, values: Any) -> str:
    """The flag that gives a required key, or the entry that was meant, if another of almost this
    name is there."""
    for name in names[:-2]:
        values = values.get(name) if isinstance(values, Mapping) else None

    if len(names) > 2 and isinstance(values, Mapping):
        close = difflib.get_close_matches(
            names[-2], [name for name in values if name != names[-2]], n=1, cutoff=0.8
        )
        if close:
            return f"did you mean '{'.'.join((*names[:-2], close[0], names[-1]))}'?"

    usage = schema.usage(place) if place.kind is not None else f"--{schema.dashed(*names)}"
    if where.startswith("steps."):
        usage = f"--{where}.{usage[2:]}"

    return f"give {usage} or set it in the recipe"


def _no_section(place: Place, given: Flag | None, value: Any, prefix: str) -> UserError:
    """A value where keys are wanted."""
    below, kind = next(schema.leaves(place.kind), ((), None))
    chosen = "NAME" in below[:1]
    if given:
        usage = (
            f"--{place.flag}.{schema.dashed(*below)} {given.typed()}"
            if chosen
            else schema.usage(place)
        )
        what = "needs a name for what it is given" if chosen else "has keys of its own"
        return UserError(f"{prefix}'{given.name}' {what} (it is {given.typed()})", f"use {usage}")

    inner = (
        _shown(value) if chosen and not isinstance(value, (list, tuple)) else schema.metavar(kind)
    )
    if below:
        inner = f"{{{_nested(below, inner)}}}"

    return UserError(
        f"{prefix}'{'.'.join(place.names)}' is a mapping (it is {_shown(value)})",
        f"write {place.names[-1]}: {inner}" if place.names else "write `key: value` lines",
    )


def _nested(names: Sequence[str], value: str) -> str:
    """`a: {b: value}`"""
    *above, last = names
    text = f"{last}: {value}"
    for name in reversed(above):
        text = f"{name}: {{{text}}}"

    return text


def _rule(detail: ErrorDetails, kind: Any) -> tuple[str, str]:
    """What a value must be, and the cure."""
    bounds = {
        "greater_than": ("gt", "must be greater than {}"),
        "greater_than_equal": ("ge", "must be at least {}"),
        "less_than": ("lt", "must be less than {}"),
        "less_than_equal": ("le", "must be at most {}"),
        "too_short": ("min_length", "needs at least {}"),
        "too_long": ("max_length", "takes at most {}"),
    }
    if detail["type"] in bounds:
        name, text = bounds[detail["type"]]
        return text.format(_shown(detail["ctx"][name])), "mend the value"

    if detail["type"] == "finite_number":
        return "must be a finite number", "mend the value"

    for part in detail["loc"][::-1]:  # an error inside of a list is about its items
        if isinstance(part, int) and schema.takes_several(kind):
            lists = [one for one in schema.kinds(kind) if one is not Any]
            kind = schema.item(lists[0], part) if lists else kind
            break

    if detail["type"] == "literal_error":
        return f"must be {schema.wanted(kind)}", "mend the value"

    given, options = detail["input"], schema.kinds(kind)
    cure = "mend the value"
    if str in options and isinstance(given, (bool, int, float)):
        cure = "put it in quotes"
    elif bool in options and str not in options:
        cure = "write true or false"
    elif schema.takes_several(kind) and not isinstance(given, (Mapping, list, tuple)):
        cure = f"write [{_shown(given)}]"

    return f"{schema.wanted(kind)} is wanted", cure


def _shown(value: Any) -> str:
    """A value as it is written in a recipe, the beginning of a long one."""
    if isinstance(value, bool):
        text = "true" if value else "false"
    elif value is None:
        text = "null"
    elif isinstance(value, Mapping):
        text = "a mapping"
    elif isinstance(value, (list, tuple)):
        text = f"[{', '.join(map(_shown, value))}]"
    elif isinstance(value, float):
        text = f"{value:g}"
    else:
        text = f"'{value}'" if isinstance(value, str) else str(value)

    return text if len(text) <= 100 else f"{text[:97]}..."
