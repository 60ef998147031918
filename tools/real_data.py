"""The files that `recipes/real` reads: their sources, licences and checksums.

python tools/real_data.py check DIR    name every file that is missing or another; status 1
python tools/real_data.py table        print the table of docs/data.md
python tools/real_data.py sums DIR     print recipes/real/files.tsv with the checksums of DIR
"""

from __future__ import annotations

import csv
import hashlib
import io
import sys
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

LIST = Path(__file__).parents[1] / "recipes" / "real" / "files.tsv"


@dataclass(frozen=True)
class DataFile:
    """One file, as it is listed."""

    path: str
    """below the directory of the data"""
    records: str
    """in it; "a of b" where it holds a of the b records of its source"""
    source: str
    """OWNER/REPOSITORY/path on GitHub"""
    commit: str
    licence: str
    sha256: str


def read_list() -> list[DataFile]:
    """Read what is listed."""
    with open(LIST, encoding="utf-8", newline="") as file:
        return [DataFile(**row) for row in csv.DictReader(file, delimiter="\t")]


def compute_sum(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check(directory: Path) -> list[str]:
    """Return a line for each listed file that is not in `directory`, or is another there."""
    faults = []
    for listed in read_list():
        path = directory / listed.path
        if not path.is_file():
            faults.append(f"{path}: missing; it comes from github.com/{listed.source}")
        elif compute_sum(path) != listed.sha256:
            faults.append(f"{path}: another file than the one listed ({listed.records} records)")

    return faults


def format_table() -> str:
    """Return the list as a table of Markdown."""
    lines = ["| file | records | source, at commit | licence | SHA-256 |", "|---|---|---|---|---|"]
    for listed in read_list():
        owner, repository, path = listed.source.split("/", 2)
        address = f"https://github.com/{owner}/{repository}/tree/{listed.commit}"
        source = f"[{owner}/{repository}]({address}): `{path}`"
        lines.append(
            f"| `{listed.path}` | {listed.records} | {source} | {listed.licence} | "
            f"`{listed.sha256}` |"
        )

    return "\n".join(lines)


def format_sums(directory: Path) -> str:
    """Return the list with the checksums of the files in `directory`."""
    out = io.StringIO()
    names = [field.name for field in fields(DataFile)]
    writer = csv.DictWriter(out, names, delimiter="\t", lineterminator="\n")
    writer.writeheader()
    for listed in read_list():
        known = replace(listed, sha256=compute_sum(directory / listed.path))
        writer.writerow(asdict(known))

    return out.getvalue()


def main(words: list[str]) -> int:
    """Carry out one command line, and return its exit status."""
    match words:
        case ["check", directory]:
            faults = check(Path(directory))
            print("\n".join(faults) or f"{directory}: all {len(read_list())} files are as listed")
            return int(bool(faults))
        case ["table"]:
            print(format_table())
        case ["sums", directory]:
            print(format_sums(Path(directory)), end="")
        case _:
            print(__doc__, file=sys.stderr)
            return 2

    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
