"""Paths of data: the files each stands for, and the rows in them, for every stage alike.

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
from llama2.reading.packed import PACKINGS, ZIP, list_members, show_path, strip_packing
from llama2.reading.rows import BadRow, File, Numbered, Row, read_text, tidy
from llama2.reading.tables import read_csv, read_parquet, read_tsv
from llama2.reading.values import read_json, read_json_lines
from llama2.tally import Tally
from llama2.terminal_text import say

__all__ = [
    "BadRow",
    "File",
    "Row",
    "expand_home",
    "find_files",
    "find_fixed_folder",
    "find_matches",
    "has_named_rows",
    "is_pattern",
    "name_set",
    "read_filled",
    "read_rows",
    "read_tables",
    "tidy",
    "walk",
]
T = TypeVar("T")
Place = str | os.PathLike[str]
Use = Literal["rows", "documents", "records"]
"""rows: a text file holds lines; documents: it holds prose, in more endings; records: no text file,
and a file that is named and has an unknown ending is JSON Lines"""

_READERS: dict[str, Callable[[File], Numbered]] = {
    ".jsonl": read_json_lines,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".txt": read_text,
    ".parquet": read_parquet,
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
    r"|(notice|change[-_]?log|contributing|citation|authors|data_?card|dataset_?card)"
    r"(\.(txt|text|md|rst))?"
    r"|(dataset_infos?|dataset_dict|dataset-metadata|state|manifest|summary|config|package)\.json"
    r"|metrics\.jsonl|requirements\.txt|(md5|sha\d*)(sums?)?\.txt",
    re.IGNORECASE,
)


def read_rows(file: File) -> Iterator[Row | BadRow]:
    """The rows of a file in their order. UserError where it is so damaged that no next row can be
    told."""
    for row in _READERS[file.kind](file):
        if isinstance(row, BadRow):
            yield row
        else:
            yield Row(row[1], f"{file.label}:{row[0]}", file.name)


def read_tables(
    paths: Place | Iterable[Place], tally: Tally | None = None
) -> Iterator[Iterator[Row | BadRow]]:
    """One iterator of rows for every file at `paths`; none is empty."""
    return (rows for _, rows in read_filled(paths, read_rows, tally=tally))


def read_filled(
    paths: Place | Iterable[Place],
    read: Callable[[File], Iterator[T]],
    use: Use = "rows",
    what: str = "records",
    tally: Tally | None = None,
    may_be_empty: bool = False,
) -> Iterator[tuple[File, Iterator[T]]]:
    """Every file with what `read` finds in it. An empty one among several is left out; UserError if
    all are."""
    files, is_empty = find_files(paths, use, tally), True
    for file in files:
        content = read(file)
        for item in content:
            is_empty = False
            yield file, chain([item], content)
            break
        else:
            if len(files) > 1:
                _leave_out(tally, Counter({"empty": 1}), file.label)

    if not is_empty or may_be_empty:
        return
    if len(files) == 1:
        raise UserError(f"{files[0].label}: the file is empty", f"it should hold {what}")

    named = ", ".join(map(show_path, _list(paths)))
    raise UserError(f"{named}: all {len(files)} files are empty", f"they should hold {what}")


def find_files(
    paths: Place | Iterable[Place], use: Use = "rows", tally: Tally | None = None
) -> list[File]:
    """Return the files of known kinds that the paths name, in order; UserError for a path that
    names none.

    What is left out is counted in `tally`, or said on standard error.
    """
    every: list[File] = []
    for path in _list(paths):
        left_out: Counter[str] = Counter()
        files: dict[File, None] = {}  # a glob may match a folder and what is in it
        for place in find_matches(path):
            is_named = place == expand_home(path) and not place.is_dir()
            find = _find_named if is_named else _search
            files |= dict.fromkeys(find(place, use, left_out))

        if not files:
            raise _explain_nothing(path, use, left_out)
        if left_out:
            _leave_out(tally, left_out, show_path(path))

        every += files

    _note_splits(every, tally)
    return every


def _explain_nothing(path: Place, use: Use, left_out: Counter[str]) -> UserError:
    """Return the error for a path at which there is no data."""
    others = f", only {', '.join(left_out)}" if left_out else ""
    cure = f"known endings: {_list_endings(use)}"
    if any("archive" in reason for reason in left_out):
        cure = f"unpack the archives inside, or: {cure}"

    return UserError(f"{show_path(path)}: there is no file of a known kind{others}", cure)


def _note_splits(files: list[File], tally: Tally | None) -> None:
    """Note where a folder has a part to test on beside the one to train on: both are read."""
    splits = [match[1].lower() for match in map(_SPLIT.fullmatch, map(_stem, files)) if match]
    if tally is not None and len(set(splits)) > 1:
        for split in splits:
            tally.note("splits read alike", split)


def _stem(file: File) -> str:
    name = (file.member or file.path.name).rpartition("/")[2]
    return strip_packing(name).rpartition(".")[0]


def find_matches(path: Place) -> list[Path]:
    """Return the file or folder at a path, or all those that fit a glob, sorted; UserError if there
    are none."""
    place = expand_home(path)
    with explain_os_errors(place):
        if is_pattern(path):
            matches = sorted(map(Path, glob.glob(str(place), recursive=True)))
            cause, cure = "no file matches this pattern", "check the path"
        else:
            matches = [place] if place.exists() else []
            cause = "no such file or directory"
            cure = "check the path, or run the stage that makes it"

    if not matches:
        raise UserError(f"{show_path(place)}: {cause}", cure)

    return matches


def is_pattern(path: Place) -> bool:
    """Return whether a path is a glob and not the name of a file, which may have brackets in it."""
    return glob.has_magic(os.fspath(path)) and not os.path.lexists(expand_home(path))


def find_fixed_folder(pattern: Place) -> Path:
    """Return the folder in which the matches of a glob lie, or folders in it."""
    parents = expand_home(pattern).parents
    return next(folder for folder in parents if not glob.has_magic(str(folder)))


def walk(folder: Path, without: Collection[str] = ()) -> Iterator[Path]:
    """Every file below a folder, links followed, sorted; none of the names `without` right below
    it.

    A folder that is not entered, because it is hidden or was entered before (a link in a circle),
    stands for what is in it.
    """
    with explain_os_errors(folder):
        here = folder.resolve()
        yield from _walk(folder, {_identify(place) for place in (here, *here.parents)}, without)


def _walk(
    folder: Path, entered: set[tuple[int, int]], without: Collection[str] = ()
) -> Iterator[Path]:
    for name in sorted(set(os.listdir(folder)).difference(without)):
        path = folder / name
        if not path.is_dir() or _is_hidden(name) or _identify(path) in entered:
            yield path
        else:
            entered.add(_identify(path))
            yield from _walk(path, entered)


def _identify(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def has_named_rows(file: File) -> bool:
    """Return whether a file is called after rows that are more than lines of text."""
    return bool(_kind(file.member or file.path.name, "records"))


def name_set(file: str) -> str:
    """Return what to call the records of a file: its stem, with its directory where the stem says
    nothing."""
    parent, _, leaf = file.rpartition("/")
    stem = strip_packing(leaf).rpartition(".")[0] or leaf
    return f"{parent.rpartition('/')[2]}/{stem}".lstrip("/") if _NAMELESS.fullmatch(stem) else stem


def _find_named(path: Path, use: Use, left_out: Counter[str]) -> Iterator[File]:
    """The file that a user names, or the members of the archive."""
    label = show_path(path)
    if _is_pointer(path):
        raise UserError(
            f"{label}: a pointer of Git LFS, the data itself is not here",
            "fetch it: git lfs pull",
        )
    if path.suffix.lower() == ZIP:
        yield from _find_members(path, use, left_out)
        return

    kind = _kind(path.name, use) or (".jsonl" if use == "records" else "")
    if not kind and _TAR.search(path.name):
        raise UserError(
            f"{label}: a tar archive, which is not read", "unpack it (tar -xf) and name the folder"
        )
    if not kind:
        raise UserError(
            f"{label}: cannot tell what kind of file this is",
            f"known endings: {_list_endings(use)}",
        )

    yield File(path, "", label, name_set(show_path(f"{path.parent.name}/{path.name}")), kind)


def _is_pointer(path: Path) -> bool:
    with explain_os_errors(path):
        if not path.is_file() or path.stat().st_size > 1024:
            return False

        with open(path, "rb") as file:
            return file.read(40).startswith(b"version https://git-lfs.github.com/")


def _search(place: Path, use: Use, left_out: Counter[str]) -> Iterator[File]:
    """The data files of a folder, or the file if it is one."""
    seen: set[tuple[int, int]] = set()
    is_run = (place / "manifest.json").is_file() and (place / "config.yaml").is_file()
    for path in walk(place) if place.is_dir() else [place]:
        inside = path.relative_to(place).parts
        reason = _why_unwanted(path, use)
        if is_run and inside[0].startswith("heldout"):
            reason = "held out"
        elif not reason and _identify(path) in seen:
            reason = "reached twice"

        if reason:
            left_out[reason] += 1
        else:
            seen.add(_identify(path))
            yield from _find_named(path, use, left_out)


def _find_members(path: Path, use: Use, left_out: Counter[str]) -> Iterator[File]:
    for member in list_members(path):
        parts = PurePosixPath(member).parts or (member,)
        reason = "hidden" if any(map(_is_hidden, parts)) else ""
        reason = reason or _why_no_data(parts[-1], use, inside=True)
        if reason:
            left_out[reason] += 1
            continue

        label, name = f"{show_path(path)}!{member}", name_set(f"{path.stem}/{member}")
        yield File(path, member, label, name, _kind(member, use))


def _why_unwanted(path: Path, use: Use) -> str:
    """Return why a file of a folder is left out, or nothing."""
    if _is_hidden(path.name):
        return "hidden"
    if path.is_dir():
        return "folder reached twice"
    if not path.exists():
        return "broken link"

    return _why_no_data(path.name, use) if path.is_file() else "no regular file"


def _why_no_data(name: str, use: Use, inside: bool = False) -> str:
    """Return why the name of a file is not that of data, or nothing."""
    is_zip = name.lower().endswith(ZIP)
    if _NO_DATA.fullmatch(name):
        return name
    if _kind(name, use) or (is_zip and not inside):
        return ""
    if is_zip or _TAR.search(name):
        return f"archive inside an archive ({name})" if inside else f"tar archive ({name})"

    return f"of another kind ({Path(name).suffix.lower() or name})"


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in ("__MACOSX", "__pycache__")


def _kind(name: str, use: Use) -> str:
    return _KINDS[use].get(Path(strip_packing(name)).suffix.lower(), "")


def _list_endings(use: Use) -> str:
    packings = f"{', '.join(PACKINGS[:-1])} or {PACKINGS[-1]}"
    return f"{', '.join(_KINDS[use])}, each also with {packings}, and {ZIP}"


def _list(paths: Place | Iterable[Place]) -> list[Place]:
    return [paths] if isinstance(paths, str | os.PathLike) else list(paths)


def expand_home(path: Place) -> Path:
    """Return a path with its `~` written out."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(
            f"{path}: there is no such home directory", "write the path in full"
        ) from error


def _leave_out(tally: Tally | None, left_out: Counter[str], place: str) -> None:
    """Count files that are left out, or say so on standard error (of the first process) where
    nobody counts."""
    counts = Tally() if tally is None else tally
    for reason, count in left_out.items():
        counts.leave(reason, count)

    if tally is None and os.environ.get("RANK", "0") == "0":
        say(f"{place}: {counts.left_out()}")
