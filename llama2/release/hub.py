"""Upload of a release to the Hugging Face Hub. Nothing here runs, or is even imported, unless it is asked for."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from llama2.errors import UserError, missing_extra


class Client(Protocol):
    """The part of huggingface_hub's `HfApi` that an upload needs."""

    def whoami(self) -> dict[str, Any]: ...
    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool, repo_type: str) -> Any: ...
    def upload_folder(self, *, repo_id: str, folder_path: str, repo_type: str, commit_message: str) -> Any: ...


def connect() -> Client:
    """huggingface_hub's client; UserError where there is no library or no token."""
    try:
        from huggingface_hub import HfApi, get_token
    except ImportError:
        raise missing_extra("huggingface_hub", "release") from None
    if not get_token():
        raise UserError("there is no token for the Hugging Face Hub", "set HF_TOKEN, or run `hf auth login`")
    client: Client = HfApi()
    return client


def push(release: Path, repository: str, *, private: bool, sure: bool, client: Client | None = None,
         ask: Callable[[str], str] | None = None) -> None:
    """Upload a finished release after showing what it holds; without `sure` somebody must say yes.

    UserError where nobody can be asked or says no, and for whatever the Hub refuses.
    """
    if repository.count("/") != 1 or not all(repository.split("/")):
        raise UserError(f"--push {repository}: this is no name of a repository", "it looks like OWNER/NAME")
    files = sorted(path for path in release.rglob("*") if path.is_file())
    size = sum(path.stat().st_size for path in files)
    if not sure and ask is None and not sys.stdin.isatty():
        raise UserError(f"--push {repository}: nobody is here to confirm the upload", "add --yes if you are sure")
    client = client or connect()
    for path in files:
        print(f"  {path.relative_to(release).as_posix()}  {path.stat().st_size:,} bytes", file=sys.stderr)
    kind = "private" if private else "PUBLIC"
    print(f"{len(files)} files, {size:,} bytes, to the {kind} repository {repository} (one that exists keeps its "
          "visibility)", file=sys.stderr)
    if not sure and (ask or input)("Upload? [y/N] ").strip().lower() not in ("y", "yes"):
        raise UserError("nothing was uploaded", f"the release is in {release}")
    try:
        client.whoami()
        client.create_repo(repository, private=private, exist_ok=True, repo_type="model")
        client.upload_folder(repo_id=repository, folder_path=str(release), repo_type="model",
                             commit_message="Release")
    except Exception as error:
        if not _is_refusal(error):
            raise
        raise UserError(f"the Hugging Face Hub refused: {' '.join(str(error).split())}",
                        f"check the token, its rights and the name; the release itself is in {release}") from error


def _is_refusal(error: Exception) -> bool:
    """Whether an upload failed for the Hub's or the network's reasons, and not for ours."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & {"HfHubHTTPError", "HFValidationError", "LocalTokenNotFoundError", "HTTPError", "OSError",
                         "TransportError"})
