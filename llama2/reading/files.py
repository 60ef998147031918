"""What a path of data stands for: files, and the rows in them, for every stage alike.

A path is a file, a folder (searched through, links followed), a zip archive or a glob. `~` is the
home directory. Files lie in the order of their names. What a folder, a glob or an archive holds
beside data is left out, counted and said: hidden files, notices such as README and LICENSE, what is
known to describe a set, files of other kinds, empty ones, and files that are reached twice. A file
that is named itself is read whatever it is called.

| ending, packed or not (.gz, .bz2, .xz, .zst) | a row |
|---|---|
| .jsonl, .ndjson | the value of a line |
| .json | an element of a list, a row of columns, else the value; JSON Lines too |
| .csv | a mapping of the header's names to texts |
| .tsv | under a header a mapping, else a list of texts |
| .txt, .text | a line |
| .parquet | a mapping |
"""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Literal, TypeVar

from llama2.errors import UserError, explain_os_errors
from llama2.reading.packed import PACKINGS, ZIP, members, shown, unpacked
from llama2.reading.rows import Bad, File, Found, Row, text_rows, tidy
from llama2.reading.tables import csv_rows, parquet_rows, tsv_rows
from llama2.reading.values import json_lines, json_values
from llama2.tally import Tally
from llama2.terminal_text import say

__all__ = [
    "Bad",
    "File",
    "Row",
    "at_home",
    "files",
    "filled",
    "fixed",
    "is_pattern",
    "matches",
    "rows",
    "set_name",
    "tables",
    "tidy",
    "walk",
]
T = TypeVar("T")
Place = str | os.PathLike[str]
Use = Literal["rows", "documents", "records"]
"""rows: a text file holds lines; documents: it holds prose, in more endings; records: no text file,
and a file that is named and has an unknown ending is JSON Lines"""

_READERS: dict[str, Callable[[File], Found]] = {
    ".jsonl": json_lines,
    ".json": json_values,
    ".csv": csv_rows,
    ".tsv": tsv_rows,
    ".txt": text_rows,
    ".parquet": parquet_rows,
}
_DATA = {
    ".jsonl": ".jsonl",
    ".ndjson": ".jsonl",
    **{kind: kind for kind in (".json", ".csv", ".tsv", ".parquet")},
}
_TEXT = {".txt": ".txt", ".text": ".txt"}
_KINDS: dict[Use, dict[str, str]] = {
    "rows": _DATA | _TEXT,
    "documents": _DATA | _TEXT | {".md": ".txt", ".rst": ".txt"},
    "records": _DATA,
}
_NAMELESS = re.compile(
    r"(train|test|valid|validation|dev|data|dataset|questions?|all)([-_.].*)?", re.IGNORECASE
)
_SPLIT = re.compile(
    r"(?:.*[-_.])?(train(?:ing)?|test|valid|validation|dev|eval)(?:[-_.].*)?", re.IGNORECASE
)
_TAR = re.compile(r"\.(tar|tgz|tbz2?|txz|tar\.\w+)$", re.IGNORECASE)
_NO_DATA = re.compile(
    r"(read[-_ ]?me|licen[cs]e|copying)([-_ ][\w-]{1,20}|([-_. ][\w-]{1,20})?\.(txt|text|md|rst))?"
    r"|(notice|change[-_]?log|contributing|citation|authors|data_?card|dataset_?card)(\.(txt|text|md|rst))?"
    r"|(dataset_infos?|dataset_dict|dataset-metadata|state|manifest|summary|config|package)\.json"
    r"|metrics\.jsonl|requirements\.txt|(md5|sha\d*)(sums?)?\.txt",
    re.IGNORECASE,
)


def rows(file: File) -> Iterator[Row | Bad]:
    """The rows of a file in their order. UserError where it is so damaged that no next row can be
    told."""
    for found in _READERS[file.kind](file):
        yield (
            found
            if isinstance(found, Bad)
            else Row(found[1], f"{file.label}:{found[0]}", file.name)
        )


def tables(
    paths: Place | Iterable[Place], tally: Tally | None = None
) -> Iterator[Iterator[Row | Bad]]:
    """One iterator of rows for every file at `paths`; none is empty."""
    return (found for _, found in filled(paths, rows, tally=tally))


def filled(
    paths: Place | Iterable[Place],
    read: Callable[[File], Iterator[T]],
    use: Use = "rows",
    what: str = "records",
    tally: Tally | None = None,
    may_be_empty: bool = False,
) -> Iterator[tuple[File, Iterator[T]]]:
    """Every file with what `read` finds in it. An empty one among several is left out; UserError if
    all are."""
    found, some = files(paths, use, tally), may_be_empty
    for file in found:
        content = read(file)
        for item in content:
            some = True
            yield file, chain([item], content)
            break
        else:
            if len(found) > 1:
                _leave(tally, Counter({"empty": 1}), file.label)

    if not some:
        named, cure = ", ".join(map(shown, _listed(paths))), f"should hold {what}"
        raise (
            UserError(f"{found[0].label}: the file is empty", f"it {cure}")
            if len(found) == 1
            else UserError(f"{named}: all {len(found)} files are empty", f"they {cure}")
        )


def files(
    paths: Place | Iterable[Place], use: Use = "rows", tally: Tally | None = None
) -> list[File]:
    """The files of known kinds that the paths name, in order; UserError for a path that names none.

    What is left out is counted in `tally`, or said on standard error.
    """
    every: list[File] = []
    for path in _listed(paths):
        left: Counter[str] = Counter()
        found: dict[File, None] = {}  # a glob may match a folder and what is in it
        for place in matches(path):
            named = place == at_home(path) and not place.is_dir()
            found |= dict.fromkeys(
                _named(place, use, left) if named else _searched(place, use, left)
            )

        if not found:
            held = f", only {', '.join(left)}" if left else ""
            unpack = (
                "unpack the archives inside, or: "
                if any("archive" in reason for reason in left)
                else ""
            )
            raise UserError(
                f"{shown(path)}: there is no file of a known kind{held}",
                f"{unpack}known endings: {_known(use)}",
            )

        if left:
            _leave(tally, left, shown(path))

        every += found

    _note_splits(every, tally)
    return every


def _note_splits(found: list[File], tally: Tally | None) -> None:
    """Say so where a folder has a part to test on beside the one to train on: both are read."""
    splits = [match[1].lower() for file in found if (match := _SPLIT.fullmatch(_stem(file)))]
    if tally is not None and len(set(splits)) > 1:
        for split in splits:
            tally.note("splits read alike", split)


def _stem(file: File) -> str:
    return unpacked((file.member or file.path.name).rpartition("/")[2]).rpartition(".")[0]


def matches(path: Place) -> list[Path]:
    """The file or folder at a path, or all those that fit a glob, sorted; UserError if there are
    none."""
    place = at_home(path)
    if not is_pattern(path):
        with explain_os_errors(place):
            if place.exists():
                return [place]

        raise UserError(
            f"{shown(place)}: no such file or directory",
            "check the path, or run the stage that makes it",
        )

    with explain_os_errors(place):
        found = sorted(Path(each) for each in glob.glob(str(place), recursive=True))

    if not found:
        raise UserError(f"{shown(place)}: no file matches this pattern", "check the path")

    return found


def is_pattern(path: Place) -> bool:
    """Whether a path is a glob and not the name of a file, which may have brackets in it."""
    return glob.has_magic(os.fspath(path)) and not os.path.lexists(at_home(path))


def fixed(pattern: Place) -> Path:
    """The folder in which the matches of a glob lie, or folders in it."""
    place = at_home(pattern)
    return next(above for above in place.parents if not glob.has_magic(str(above)))


def walk(folder: Path, without: Collection[str] = ()) -> Iterator[Path]:
    """Every file below a folder, links followed, sorted; none of the names `without` right below
    it.

    A folder that is not entered, because it is hidden or was entered before (a link in a circle),
    stands for what is in it.
    """
    with explain_os_errors(folder):
        here = folder.resolve()
        yield from _walk(folder, {_identity(place) for place in (here, *here.parents)}, without)


def _walk(
    folder: Path, entered: set[tuple[int, int]], without: Collection[str] = ()
) -> Iterator[Path]:
    for name in sorted(set(os.listdir(folder)).difference(without)):
        path = folder / name
        if not path.is_dir() or _hidden(name) or _identity(path) in entered:
            yield path
        else:
            entered.add(_identity(path))
            yield from _walk(path, entered)


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def is_rows(file: File) -> bool:
    """Whether a file is called after rows that are more than lines of text."""
    return bool(_kind(file.member or file.path.name, "records"))


def set_name(file: str) -> str:
    """What to call the records of a file: its stem, with its directory where the stem says
    nothing."""
    parent, _, leaf = file.rpartition("/")
    stem = unpacked(leaf).rpartition(".")[0] or leaf
    return f"{parent.rpartition('/')[2]}/{stem}".lstrip("/") if _NAMELESS.fullmatch(stem) else stem


def _named(path: Path, use: Use, left: Counter[str]) -> Iterator[File]:
    """The file that a user names, or the members of the archive."""
    if _is_pointer(path):
        raise UserError(
            f"{shown(path)}: a pointer of Git LFS, the data itself is not here",
            "fetch it: git lfs pull",
        )

    if path.suffix.lower() == ZIP:
        yield from _members(path, use, left)
        return

    kind = _kind(path.name, use) or (".jsonl" if use == "records" else "")
    if not kind and _TAR.search(path.name):
        raise UserError(
            f"{shown(path)}: a tar archive, which is not read",
            "unpack it (tar -xf) and name the folder",
        )
    if not kind:
        raise UserError(
            f"{shown(path)}: cannot tell what kind of file this is", f"known endings: {_known(use)}"
        )

    yield File(path, "", shown(path), set_name(shown(f"{path.parent.name}/{path.name}")), kind)


def _is_pointer(path: Path) -> bool:
    with explain_os_errors(path):
        if not path.is_file() or path.stat().st_size > 1024:
            return False

        with open(path, "rb") as file:
            return file.read(40).startswith(b"version https://git-lfs.github.com/")


def _searched(place: Path, use: Use, left: Counter[str]) -> Iterator[File]:
    """The data files of a folder, or the file if it is one."""
    seen: set[tuple[int, int]] = set()
    run = (place / "manifest.json").is_file() and (place / "config.yaml").is_file()
    for path in walk(place) if place.is_dir() else [place]:
        inside = path.relative_to(place).parts
        reason = "held out" if run and inside[0].startswith("heldout") else _unwanted(path, use)
        if not reason and _identity(path) in seen:
            reason = "reached twice"

        if reason:
            left[reason] += 1
            continue

        seen.add(_identity(path))
        yield from _named(path, use, left)


def _members(path: Path, use: Use, left: Counter[str]) -> Iterator[File]:
    for member in members(path):
        parts = PurePosixPath(member).parts or (member,)
        reason = "hidden" if any(map(_hidden, parts)) else _no_data(parts[-1], use, inside=True)
        if reason:
            left[reason] += 1
        else:
            yield File(
                path,
                member,
                f"{shown(path)}!{member}",
                set_name(f"{path.stem}/{member}"),
                _kind(member, use),
            )


def _unwanted(path: Path, use: Use) -> str:
    """Why a file of a folder is left out, or nothing."""
    if _hidden(path.name):
        return "hidden"
    if path.is_dir():
        return "folder reached twice"
    if not path.exists():
        return "broken link"

    return _no_data(path.name, use) if path.is_file() else "no regular file"


def _no_data(name: str, use: Use, inside: bool = False) -> str:
    if _NO_DATA.fullmatch(name):
        return name
    if _kind(name, use) or (name.lower().endswith(ZIP) and not inside):
        return ""
    if name.lower().endswith(ZIP) or _TAR.search(name):
        return f"archive inside an archive ({name})" if inside else f"tar archive ({name})"

    return f"of another kind ({Path(name).suffix.lower() or name})"


def _hidden(name: str) -> bool:
    return name.startswith(".") or name in ("__MACOSX", "__pycache__")


def _kind(name: str, use: Use) -> str:
    return _KINDS[use].get(Path(unpacked(name)).suffix.lower(), "")


def _known(use: Use) -> str:
    return f"{', '.join(_KINDS[use])}, each also with {', '.join(PACKINGS[:-1])} or {PACKINGS[-1]}, and {ZIP}"


def _listed(paths: Place | Iterable[Place]) -> list[Place]:
    return [paths] if isinstance(paths, str | os.PathLike) else list(paths)


def at_home(path: Place) -> Path:
    """A path with its `~` written out."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(
            f"{path}: there is no such home directory", "write the path in full"
        ) from error


def _leave(tally: Tally | None, left: Counter[str], place: str) -> None:
    """Count files that are left out, or say so on standard error (of the first process) where
    nobody counts."""
    counts = Tally() if tally is None else tally
    for reason, count in left.items():
        counts.leave(reason, count)

    if tally is None and os.environ.get("RANK", "0") == "0":
        say(f"{place}: {counts.left_out()}")
