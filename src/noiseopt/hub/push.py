"""Uploading the repository of a card through huggingface_hub, and verifying the upload."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from .build import AnyCard, contents

if TYPE_CHECKING:
    from huggingface_hub import HfApi


class PushFailed(RuntimeError):
    """Raised if a card was not uploaded, or the upload differs from the local card. The message names the remedy."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pushed:
    """A repository with the content of its card.

    Attributes:
        url: Its address.
        commit: The commit with that content.
        changed: Whether the commit is new.
    """

    url: str
    commit: str
    changed: bool


def push(
    card: AnyCard, namespace: str, *, private: bool = False, tag: str | None = None, api: HfApi | None = None
) -> Pushed:
    """Upload a card, generated anew for that account, to `namespace/<card name>`, with picture or weights.

    Other files of the repository stay. Unchanged files make no commit. The files are downloaded again and compared.

    Args:
        card: The card to upload.
        namespace: The account or organization.
        private: Create a private repository. An existing public one is refused.
        tag: The name of the commit, for `custom_revision=` of diffusers. A tag never moves.
        api: The Hub and the token, by default those of the environment.

    Raises:
        PushFailed: Without a login, or if the Hub refuses or returns other content.
        Refused: For a pipeline that cannot be bundled.
    """
    from huggingface_hub import HfApi

    api = api or HfApi()
    files, repository = contents(card, namespace), f"{namespace}/{card.name}"
    require_login(api)
    with failures(repository):
        url = str(api.create_repo(repository, private=private or None, exist_ok=True))
        before = api.model_info(repository)
        if private and not before.private:
            raise PushFailed(
                f"Expected {repository} to be private, but it is there and public. Make it private at {url}."
            )
        if tag is not None:
            require_free(api, repository, tag, files)
        commit = commit_files(api, repository, files, f"Update {card.title}")
        compare(api, repository, commit, files)
        if tag is not None:
            api.create_tag(repository, tag=tag, revision=commit, exist_ok=True)
    return Pushed(url=url, commit=commit, changed=commit != before.sha)


def require_login(api: HfApi) -> None:
    """Raise `PushFailed` without a token."""
    from huggingface_hub import get_token

    if not (api.token or get_token()):
        raise PushFailed("Expected a login to the Hub, but found none. Run `hf auth login`, or set HF_TOKEN.")


@contextlib.contextmanager
def failures(repository: str) -> Iterator[None]:
    """Raise errors of the connection and of the Hub as `PushFailed`."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except HfHubHTTPError as error:
        raise PushFailed(
            f"The Hub refuses {repository}: {reason(error)} {remedy(error.response.status_code)}"
        ) from error
    except PushFailed:
        raise
    # Connection errors are of the base class of this error, which depends on the HTTP client of huggingface_hub; a
    # failed upload is a RuntimeError, and a front matter that the Hub refuses is a ValueError.
    except (*HfHubHTTPError.__bases__, RuntimeError, ValueError) as error:  # pyright: ignore[reportGeneralTypeIssues]
        raise PushFailed(f"{repository} was not uploaded: {reason(error)} {remedy(0)}") from error


def reason(error: Exception) -> str:
    """Return the last line of a message, which holds the Hub's own words, as a sentence."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__).rstrip(".") + "."


def remedy(status: int) -> str:
    """Return the remedy for an HTTP status of the Hub."""
    known = {
        401: "Run `hf auth login` with a token that is valid.",
        403: "Give `--namespace` an account that your token may write to, and the token the right to write.",
    }
    return known.get(status, "Run the same command once more: what has arrived is not sent again.")


def commit_files(api: HfApi, repository: str, files: Mapping[str, bytes | Path], message: str) -> str:
    """Commit the files that differ, and return the id of the commit, or of the last one if none differs."""
    from huggingface_hub import CommitOperationAdd

    operations = [CommitOperationAdd(name, data) for name, data in files.items()]
    return api.create_commit(repository, operations, commit_message=message).oid


def require_free(api: HfApi, repository: str, tag: str, files: Mapping[str, bytes | Path]) -> None:
    """Raise `PushFailed` if a tag exists and has other files."""
    if tag not in {reference.name for reference in api.list_repo_refs(repository).tags}:
        return
    if different(api, repository, tag, files):
        raise PushFailed(
            f"Expected a new tag, but {repository} has {tag!r} with other files, which users may rely on. "
            "Choose another name."
        )


def compare(api: HfApi, repository: str, revision: str, files: Mapping[str, bytes | Path]) -> None:
    """Raise `PushFailed` unless a revision has the files that were sent."""
    if wrong := different(api, repository, revision, files):
        raise PushFailed(f"Expected {repository} to hold what was sent, but {', '.join(wrong)} came back different.")


def different(api: HfApi, repository: str, revision: str, files: Mapping[str, bytes | Path]) -> list[str]:
    """Return the names of those `files` that are missing from a Hub repository at `revision`, or differ there."""
    with tempfile.TemporaryDirectory() as folder:
        api.snapshot_download(repository, revision=revision, local_dir=folder, allow_patterns=list(files))
        there = {name: Path(folder, name) for name in files}
        return [name for name, path in there.items() if not path.is_file() or path.read_bytes() != data_of(files[name])]


def data_of(file: bytes | Path) -> bytes:
    return file.read_bytes() if isinstance(file, Path) else file
