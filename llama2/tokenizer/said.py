"""Text of messages inside a chat template, kept apart from what the template writes itself.

A template joins both to one text, in which its markers become control items. What a user typed must
never become one. So a message goes in as `Said`, which stays `Said` whatever is cut out of it, and
the moment it is joined to anything else it is *sealed*: a private-use character is put into each
spelling of a marker, and where one could arise at its ends. The template thus tests and divides
what was really said, and no later step can make a marker of it. `Seal.remove` takes the character
out of the pieces of text between the markers that are left, which are the template's.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, pairwise
from typing import Any, SupportsIndex

_PRIVATE = (range(0xE000, 0xF900), range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))
_KEPT = (
    "capitalize",
    "casefold",
    "center",
    "expandtabs",
    "ljust",
    "lower",
    "lstrip",
    "partition",
    "removeprefix",
    "removesuffix",
    "replace",
    "rjust",
    "rpartition",
    "rsplit",
    "rstrip",
    "split",
    "splitlines",
    "strip",
    "swapcase",
    "title",
    "upper",
    "zfill",
)
"""methods whose results hold nothing but what was said"""


class Said(str):
    """Text of a message, or cut out of one."""

    __slots__ = ()

    def __str__(self) -> str:
        return self

    def __iter__(self) -> Iterator[Said]:
        return map(Said, super().__iter__())

    def __getitem__(self, key: SupportsIndex | slice) -> Said:
        return Said(super().__getitem__(key))

    def __add__(self, other: str) -> Said:
        return Said(super().__add__(other))

    def __radd__(self, other: str) -> Said:
        return Said(other.__add__(str.__str__(self)))

    def __mul__(self, count: SupportsIndex) -> Said:
        return Said(super().__mul__(count))

    __rmul__ = __mul__

    def __mod__(self, values: object) -> Said:
        return Said(super().__mod__(values))


def _keep(name: str) -> Callable[..., Any]:
    method = getattr(str, name)

    @functools.wraps(method)
    def call(text: str, *args: Any, **kwargs: Any) -> Any:
        return mark(method(text, *args, **kwargs))

    return call


for _name in _KEPT:
    setattr(Said, _name, _keep(_name))


def mark(value: Any) -> Any:
    """Return a text, or a list or tuple of texts, as what was said; anything else as it is."""
    if isinstance(value, str):
        return Said(value)
    if type(value) in (list, tuple):
        return type(value)(map(mark, value))

    return value


def holds_said(value: Any) -> bool:
    """Return whether a value is or holds text of a message."""
    stack, seen = [value], set()
    while stack:
        item = stack.pop()
        if isinstance(item, Said):
            return True
        if isinstance(item, str) or id(item) in seen:
            continue

        seen.add(id(item))
        if isinstance(item, Mapping):
            stack += chain(item.keys(), item.values())
        elif isinstance(item, Iterable) and isinstance(item, (list, tuple, set, frozenset)):
            stack += item

    return False


# --- markers ---
class Markers:
    """The spellings of control items.

    `pattern` finds them in a text, the longest where several begin, as transformers does.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        self.texts = tuple(sorted(filter(None, texts)))
        tree = _join(self.texts) if self.texts else "(?!)"
        self.pattern = re.compile(tree, re.DOTALL)
        # what a template that changes the case of a text could still make of it
        self._anywhere = re.compile(f"(?={tree})", re.DOTALL | re.IGNORECASE)
        lowered = [text.lower() for text in self.texts]
        firsts = [text[0] for text in self.texts]
        self._firsts = {*map(str.lower, firsts), *map(str.upper, firsts)}
        self._longest = max(map(len, lowered), default=0)
        self._lowered = tuple(lowered)
        self._heads = {text[:end] for text in lowered for end in range(1, len(text))}
        self._tails = {text[start:] for text in lowered for start in range(1, len(text))}
        self.single = tuple(text for text in self.texts if len(text) == 1)

    def find_breaks(self, text: str) -> list[int]:
        """Return where a text must be broken so that no marker is in it, or arises around it."""
        places: list[int] = []
        if any(letter in text for letter in self._firsts):
            places += [match.start() + 1 for match in self._anywhere.finditer(text)]

        inner = text.strip().lower()
        if not inner:
            return places

        start = len(text) - len(text.lstrip())
        end = len(text.rstrip())
        ends = range(1, min(self._longest, len(inner) + 1))
        if any(inner[-length:] in self._heads for length in ends):
            places.append(end)

        within = len(inner) < self._longest and any(inner in text for text in self._lowered)
        if within or any(inner[:length] in self._tails for length in ends):
            places.append(start)

        return sorted(set(places))


@functools.lru_cache(maxsize=16)
def make_markers(texts: tuple[str, ...]) -> Markers:
    """Return the markers of these spellings, made once."""
    return Markers(texts)


def _join(texts: Iterable[str]) -> str:
    """Return a pattern for the longest of some texts: a tree, for there may be hundreds of them
    that begin alike."""
    branches: dict[str, list[str]] = {}
    optional = False
    for text in texts:
        if text:
            branches.setdefault(text[0], []).append(text[1:])
        else:
            optional = True

    if not branches:
        return ""

    parts = [re.escape(letter) + _join(rest) for letter, rest in branches.items()]
    if len(parts) == 1 and not optional:
        return parts[0]

    return f"(?:{'|'.join(parts)}){'?' if optional else ''}"


class Seal:
    """Breaks the markers in what was said, for one rendering.

    `texts` are all texts of that rendering: a character that none of them has marks the breaks.
    """

    def __init__(self, markers: Markers, texts: Sequence[str]) -> None:
        def is_free(letter: str) -> bool:
            return not any(letter in text for text in texts)

        free = filter(is_free, map(chr, chain.from_iterable(_PRIVATE)))
        self.markers, self.mark = markers, next(free)
        self.end = next(free)
        """of an answer that is begun"""
        self._stand_ins = {ord(letter): next(free) for letter in markers.single}
        self._back = {ord(put): chr(code) for code, put in self._stand_ins.items()}

    def put(self, text: str) -> str:
        """Return what was said so that no marker is in it, or arises where it is joined."""
        text = str.__str__(text)
        places = self.markers.find_breaks(text)
        if places:
            cuts = [0, *places, len(text)]
            parts = [text[begin:end] for begin, end in pairwise(cuts)]
            text = self.mark.join(parts)

        return text.translate(self._stand_ins) if self._stand_ins else text

    def remove(self, text: str) -> str:
        """Return a sealed text as it was said."""
        text = text.replace(self.mark, "")
        return text.translate(self._back) if self._back else text
