"""Upload of a release to the Hugging Face Hub. Nothing here runs, or is even imported, unless it is
asked for."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from llama2.errors import UserError, explain_missing_extra
from llama2.terminal_text import say

_REFUSALS = {
    "HfHubHTTPError",
    "HFValidationError",
    "LocalTokenNotFoundError",
    "HTTPError",
    "TransportError",
    "OSError",
}


class Client(Protocol):
    """The part of huggingface_hub's `HfApi` that an upload needs."""

    def whoami(self) -> dict[str, Any]:
        """Tell whose token it is; an error if the Hub does not know it."""

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool, repo_type: str) -> Any:
        """Create a repository unless it is there."""

    def upload_folder(
        self, *, repo_id: str, folder_path: str, repo_type: str, commit_message: str
    ) -> Any:
        """Upload a folder as one commit."""


def connect(repository: str, *, sure: bool) -> Client:
    """Return huggingface_hub's client, before any work is done.

    UserError for a bad name, where there is no library or no token, and where nobody can be asked.
    """
    if repository.count("/") != 1 or not all(repository.split("/")):
        raise UserError(
            f"--push {repository}: this is no name of a repository", "it looks like OWNER/NAME"
        )
    if not sure and not sys.stdin.isatty():
        raise UserError(
            f"--push {repository}: nobody is here to confirm the upload",
            "add --yes if you are sure",
        )

    try:
        from huggingface_hub import HfApi, get_token
    except ImportError:
        raise explain_missing_extra("huggingface_hub", "release") from None

    if not get_token():
        raise UserError(
            "there is no token for the Hugging Face Hub", "set HF_TOKEN, or run `hf auth login`"
        )

    client: Client = HfApi()
    return client


def push(
    release: Path,
    repository: str,
    client: Client,
    *,
    private: bool,
    sure: bool,
    ask: Callable[[str], str] = input,
) -> None:
    """Show what a release holds and upload it; without `sure`, `ask` must be answered with yes.

    A repository that the upload creates is private if `private` says so. UserError if the answer is
    no, and for whatever the Hub or the network refuses.
    """
    sizes = {path: path.stat().st_size for path in sorted(release.rglob("*")) if path.is_file()}
    for path, size in sizes.items():
        say(f"  {path.relative_to(release).as_posix()}  {size:,} bytes")

    visibility = "private" if private else "PUBLIC"
    print(
        f"{len(sizes)} files, {sum(sizes.values()):,} bytes, to {repository}: "
        f"{visibility} if it is new, else as visible as it is",
        file=sys.stderr,
    )
    if not sure and ask("Upload? [y/N] ").strip().lower() not in ("y", "yes"):
        raise UserError("nothing was uploaded", f"the release is in {release}")

    try:
        client.whoami()
        client.create_repo(repository, private=private, exist_ok=True, repo_type="model")
        client.upload_folder(
            repo_id=repository,
            folder_path=str(release),
            repo_type="model",
            commit_message="Release",
        )
    except Exception as error:
        if not _REFUSALS & {kind.__name__ for kind in type(error).__mro__}:
            raise

        raise UserError(
            f"the Hugging Face Hub refused: {' '.join(str(error).split())}",
            f"check the token, its rights and the name; the release is in {release}",
        ) from error
