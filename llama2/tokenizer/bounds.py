"""What a chat template may do at one stroke, and how large that may be (`sandbox`).

Attributes, filters and operators that are not listed here do not exist for a template. Those of web
pages are left out (`urlize`, `striptags`, `xmlattr`, ...), and `random`, by which no prompt would
be the same twice.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from jinja2.filters import make_attrgetter
from jinja2.utils import Namespace

from llama2.tokenizer.said import Said, holds_said, mark

if TYPE_CHECKING:
    from llama2.tokenizer.sandbox import Budget

OPERATORS = ("+", "-", "*", "/", "//", "%", "**")
_FILTERS = """
abs attr batch capitalize center count d default dictsort e escape first float forceescape
format groupby indent int items join last length list lower map max min reject rejectattr
replace reverse round safe select selectattr slice sort string sum title trim truncate unique
upper wordcount
"""
FILTERS = tuple(_FILTERS.split())
_TEXT = """
capitalize casefold center count endswith expandtabs find format format_map index isalnum
isalpha isascii isdecimal isdigit isidentifier islower isnumeric isprintable isspace istitle
isupper join ljust lower lstrip partition removeprefix removesuffix replace rfind rindex rjust
rpartition rsplit rstrip split splitlines startswith strip swapcase title upper zfill
"""
METHODS: dict[type, frozenset[str]] = {
    str: frozenset(_TEXT.split()),
    bytes: frozenset(),
    int: frozenset(),
    float: frozenset(("is_integer",)),
    list: frozenset(("count", "index", "copy")),
    tuple: frozenset(("count", "index")),
    dict: frozenset(("get", "items", "keys", "values", "copy")),
    range: frozenset(("start", "stop", "step", "count", "index")),
}
_BITS = 4096  # of a whole number
_WIDEST = 1000  # of a field in a format, and of an indentation
_PARTS = 100_000  # of `batch` and `slice`
_STRIPPED = 256  # characters that `strip` takes away
_PERCENT = re.compile(r"%(?:\([^)]*\))?[^a-zA-Z%]*(?:\d{4}|\*)")
_BRACES = re.compile(r"\{[^{}]*:[^{}]*(?:\d{4}|\{)")


class Overrun(Exception):
    """A template does more than it may."""


# --- sizes ---
def measure(value: Any, most: int) -> int:
    """Return the characters and items of a value with all that it holds, each time that it holds
    it; some number above `most` where it is more."""
    if isinstance(value, str):
        return len(value)

    size, stack = 0, [value]
    while stack and size <= most:
        item = stack.pop()
        size += 1
        if isinstance(item, str):
            size += len(item)
        elif isinstance(item, int):
            size += item.bit_length() // 8
        elif isinstance(item, range):
            size += len(item)
        elif (parts := _list_parts(item)) is not None:
            size += len(parts)
            stack += parts

    return size


def _list_parts(value: Any) -> list[Any] | None:
    """Return what a container holds; None for another value."""
    if isinstance(value, Namespace):
        value = object.__getattribute__(value, "_Namespace__attrs")
    if isinstance(value, Mapping):
        return [*value.keys(), *value.values()]
    if isinstance(value, Iterable) and hasattr(value, "__len__"):
        return list(value)

    return None


def measure_text(*values: Any) -> int:
    """Return the characters of those values that are texts."""
    return sum(len(value) for value in values if isinstance(value, str))


# --- operators ---
def seal_operands(budget: Budget, operator: str, left: Any, right: Any) -> tuple[Any, Any]:
    """Return two operands so that what was said does not mix with other text."""
    if operator == "%" and not isinstance(left, Said):
        return left, seal_deep(budget, right)

    mixed = isinstance(left, Said) is not isinstance(right, Said)
    if operator != "+" or not mixed:
        return left, right
    if (right if isinstance(left, Said) else left) == "":  # nothing of the template's is joined
        return mark(left), mark(right)

    return seal_deep(budget, left), seal_deep(budget, right)


def check_operator(budget: Budget, operator: str, left: Any, right: Any) -> None:
    """Overrun for an operation whose result would be too large."""
    numbers = isinstance(left, int) and isinstance(right, int)
    if operator == "**" and numbers:
        check_bits(left.bit_length() * max(right, 0))
    elif operator == "*" and numbers:
        check_bits(left.bit_length() + right.bit_length())
    elif operator == "*":
        count, value = (left, right) if isinstance(left, int) else (right, left)
        if isinstance(count, int):
            budget.allow(max(count, 0) * measure(value, budget.most))
    elif operator == "%" and isinstance(left, str):
        _check_format(budget, left, _PERCENT, "%", right)


def check_bits(bits: int) -> None:
    """Overrun for a whole number of too many bits."""
    if bits > _BITS:
        raise Overrun(f"it makes a number of more than {_BITS} bits")


def _check_format(
    budget: Budget, text: str, wide: re.Pattern[str], sign: str, values: object
) -> None:
    if wide.search(text):
        raise Overrun("it makes a field of a width that is too large, or is computed")

    budget.allow(len(text) + text.count(sign) * measure(values, budget.most))


def seal_deep(budget: Budget, value: Any) -> Any:
    """Return a value in which all that was said is sealed."""
    if isinstance(value, Said):
        return budget.write(value)
    if not holds_said(value):
        return value
    if isinstance(value, Mapping):
        return {key: seal_deep(budget, item) for key, item in value.items()}

    return type(value)(seal_deep(budget, item) for item in value)


# --- methods of texts ---
def call_text(
    budget: Budget, text: str, name: str, method: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Call a method of a text."""
    if name == "join":
        return join(budget, args[0] if args else (), text)
    if name == "replace":
        return replace(budget, text, *args, **kwargs)

    if name in ("format", "format_map"):
        _check_format(budget, text, _BRACES, "{", (args, kwargs))
        if isinstance(text, Said):
            return mark(method(*args, **kwargs))

        sealed = [seal_deep(budget, each) for each in args]
        return method(*sealed, **seal_deep(budget, kwargs))

    _check_size(budget, name, text, [*args, *kwargs.values()])
    return method(*args, **kwargs)


def _check_size(budget: Budget, name: str, text: str, values: list[Any]) -> None:
    number = values[0] if values and isinstance(values[0], int) else 0
    if name in ("center", "ljust", "rjust", "zfill"):
        budget.allow(number)
    elif name == "expandtabs":
        budget.allow(len(text) + text.count("\t") * number)
    elif name in ("strip", "lstrip", "rstrip") and values:
        budget.allow(0 if len(values[0] or "") <= _STRIPPED else budget.most + 1)

    budget.spend(1, len(text))


def replace(budget: Budget, value: Any, old: Any, new: Any, count: Any = None) -> str:
    """Replace a part of a text, as the method and the filter do."""
    text = value if isinstance(value, str) else budget.write(value)
    part = str(old)
    new = new if isinstance(new, str) else str(new)
    most = -1 if count is None else int(count)
    times = text.count(part)
    budget.allow(len(text) + (times if most < 0 else min(times, most)) * len(new))
    if not isinstance(text, Said):
        sealed = budget.write(new) if isinstance(new, Said) else new
        return text.replace(part, sealed, most)

    # a marker that the template puts between what was said is one
    marker = budget.seal.markers.pattern.search(new)
    if isinstance(new, Said) or marker is None or not part:
        return Said(text.replace(part, new, most))

    pieces = [budget.write(piece) for piece in text.split(part, most)]
    return str(new).join(pieces)


# --- filters ---
def join(budget: Budget, values: Any, between: Any = "") -> str:
    """Join texts, as the method and the filter do."""
    items = list(values)
    if between == "" and all(type(item) is Said for item in items):
        return Said("".join(items))

    joint = budget.write(between)
    texts = [budget.write(item) for item in items]
    budget.allow(sum(map(len, texts)) + len(joint) * len(texts))
    return joint.join(texts)


def join_attributes(
    budget: Budget, environment: Any, values: Any, between: Any = "", attribute: Any = None
) -> str:
    """Join texts, or an attribute of each value."""
    if attribute is not None:
        values = map(make_attrgetter(environment, attribute), values)

    return join(budget, values, between)


def dump_json(
    budget: Budget,
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """Return a value as JSON, with the settings that transformers gives to templates."""
    budget.allow(measure(value, budget.most))
    if isinstance(indent, (int, str)):
        _check_width(indent)

    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    parts = []
    for part in encoder.iterencode(value):
        budget.spend(1, len(part))
        parts.append(part)

    text = "".join(parts)
    return Said(text) if holds_said(value) else text


def prepare_filter(
    budget: Budget, name: str, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, tuple[Any, ...]]:
    """Return the value and the arguments of a filter; Overrun where it would do too much."""
    values = [*args, *kwargs.values()]
    budget.spend(5, measure_text(value, *values))
    match name:
        case "center":
            budget.allow(max(filter(_is_number, values), default=0))
        case "trim":
            budget.allow(0 if measure_text(*values) <= _STRIPPED else budget.most + 1)
        case "batch" | "slice":
            parts = max(filter(_is_number, values), default=0)
            budget.allow(0 if parts <= _PARTS else budget.most + 1)
        case "indent":
            width = max((_check_width(width) for width in values), default=4)
            lines = str(value).count("\n") if isinstance(value, str) else 0
            budget.allow((lines + 1) * width)
        case "round":
            check_bits(4 * max(filter(_is_number, values), default=0))
        case "sum":
            if any(isinstance(each, (list, tuple)) for each in values):
                raise Overrun("it adds lists")
        case "format":
            _check_format(budget, str(value), _PERCENT, "%", values)
            if not isinstance(value, Said):
                args = tuple(seal_deep(budget, each) for each in args)
                kwargs |= seal_deep(budget, dict(kwargs))
        case "string":
            budget.allow(measure(value, budget.most))

    return value, args


def _is_number(value: object) -> bool:
    return isinstance(value, int)


def _check_width(width: Any) -> int:
    """Return the characters of an indentation; Overrun for too many."""
    size = len(width) if isinstance(width, str) else int(width)
    if size > _WIDEST:
        raise Overrun(f"it indents by more than {_WIDEST} characters")

    return size
