"""Uploading the repository of a card through huggingface_hub, and looking whether it arrived."""

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
    """A card was not uploaded, or not as it is here; the message says why and what to do."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pushed:
    """A repository that holds what its card holds.

    Attributes:
        url: Its address.
        commit: The commit that does.
        changed: Whether that commit is new.
    """

    url: str
    commit: str
    changed: bool


def push(
    card: AnyCard, namespace: str, *, private: bool = False, tag: str | None = None, api: HfApi | None = None
) -> Pushed:
    """Upload a card, generated afresh for that account, to `namespace/<card name>`, with picture or weights.

    Files of the repository that no card has are left alone. What is there already makes no commit. The files are
    downloaded again and compared.

    Args:
        card: What to upload.
        namespace: The account or organisation.
        private: Only the account may read it. A public repository is not made private.
        tag: Name the commit, as `custom_revision=` of diffusers may ask for it. A tag never moves.
        api: The Hub and the token; by default those of the environment.

    Raises:
        PushFailed: Without a login, or where the Hub refuses or gives back something else.
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
    """What goes wrong between here and the Hub, as `PushFailed`."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except HfHubHTTPError as error:
        raise PushFailed(
            f"The Hub refuses {repository}: {reason(error)} {remedy(error.response.status_code)}"
        ) from error
    except PushFailed:
        raise
    # What tells of no connection is the base class of this error, whichever client is below huggingface_hub; a failed
    # upload is a RuntimeError, and a front matter that the Hub does not take is a ValueError.
    except (*HfHubHTTPError.__bases__, RuntimeError, ValueError) as error:  # pyright: ignore[reportGeneralTypeIssues]
        raise PushFailed(f"{repository} was not uploaded: {reason(error)} {remedy(0)}") from error


def reason(error: Exception) -> str:
    """The last line of a message, which is where the Hub's own words are, as a sentence."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__).rstrip(".") + "."


def remedy(status: int) -> str:
    """What helps against an answer of the Hub."""
    known = {
        401: "Run `hf auth login` with a token that is valid.",
        403: "Give `--namespace` an account that your token may write to, and the token the right to write.",
    }
    return known.get(status, "What has arrived is not sent again: run the same command once more.")


def commit_files(api: HfApi, repository: str, files: Mapping[str, bytes | Path], message: str) -> str:
    """One commit with all files that are not there yet as they are here; its id, or that of the last one if none is."""
    from huggingface_hub import CommitOperationAdd

    operations = [CommitOperationAdd(name, data) for name, data in files.items()]
    return api.create_commit(repository, operations, commit_message=message).oid


def require_free(api: HfApi, repository: str, tag: str, files: Mapping[str, bytes | Path]) -> None:
    """Raise `PushFailed` if a tag is there and names other files."""
    if tag not in {reference.name for reference in api.list_repo_refs(repository).tags}:
        return
    if different(api, repository, tag, files):
        raise PushFailed(
            f"Expected a new tag, but {repository} has {tag!r} with other files, which users may rely on. "
            "Choose another name."
        )


def compare(api: HfApi, repository: str, revision: str, files: Mapping[str, bytes | Path]) -> None:
    """Raise `PushFailed` unless a revision gives back what was sent."""
    if wrong := different(api, repository, revision, files):
        raise PushFailed(f"Expected {repository} to hold what was sent, but {', '.join(wrong)} came back different.")


def different(api: HfApi, repository: str, revision: str, files: Mapping[str, bytes | Path]) -> list[str]:
    """The names of files that a revision does not hold as they are here."""
    with tempfile.TemporaryDirectory() as folder:
        api.snapshot_download(repository, revision=revision, local_dir=folder, allow_patterns=list(files))
        there = {name: Path(folder, name) for name in files}
        return [name for name, path in there.items() if not path.is_file() or path.read_bytes() != data_of(files[name])]


def data_of(file: bytes | Path) -> bytes:
    return file.read_bytes() if isinstance(file, Path) else file
