"""An adapter's folder to the hub and from it, by ``huggingface_hub``."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from intarsia.errors import IntarsiaError
from intarsia.store.adapter import CARD, HEAD, TENSORS

FILES = [TENSORS, HEAD, CARD]


def push(folder: Path, repository: str, *, revision: str | None, private: bool, message: str) -> str:
    """Make the repository if there is none, and commit the adapter's files to it, in one commit. -> the commit."""
    from huggingface_hub import HfApi

    hub = HfApi()
    with _told(repository, "could not be pushed to"), _hushed():
        hub.create_repo(repository, private=private, exist_ok=True)
        if revision is not None:
            hub.create_branch(repository, branch=revision, exist_ok=True)
        done = hub.upload_folder(
            repo_id=repository, folder_path=folder, allow_patterns=FILES, revision=revision, commit_message=message
        )
    return str(done.oid)


@contextlib.contextmanager
def pulled(repository: str, revision: str | None) -> Iterator[tuple[Path, str]]:
    """A folder with the adapter's files as they are at a revision, and that commit. The folder is gone afterwards."""
    from huggingface_hub import HfApi, snapshot_download

    with tempfile.TemporaryDirectory(prefix="intarsia-") as temporary:
        folder = Path(temporary) / repository.rpartition("/")[2]
        with _told(repository, "could not be pulled from"), _hushed():
            # The commit first, so that all files are of one, whatever is pushed meanwhile.
            about = HfApi().model_info(repository, revision=revision)
            names = [file.rfilename for file in about.siblings or ()]
            if HEAD in names:
                snapshot_download(repository, revision=about.sha, local_dir=folder, allow_patterns=FILES)
        if HEAD not in names:
            found = ", ".join(names[:6]) or "nothing"
            raise IntarsiaError(f"{repository} holds no adapter of intarsia: it has no {HEAD} (found {found})")
        yield folder, str(about.sha)


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """Without the bars of the hub's client."""
    from huggingface_hub import utils as client

    silent = client.are_progress_bars_disabled()  # type: ignore[attr-defined]  # documented, and not in its __all__
    if not silent:
        client.disable_progress_bars()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        if not silent:
            client.enable_progress_bars()  # type: ignore[attr-defined]


@contextlib.contextmanager
def _told(repository: str, what: str) -> Iterator[None]:
    """Turn whatever the hub's client raises into one error about this repository."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except GatedRepoError as error:
        raise IntarsiaError(f"{repository}: gated on the hub; accept its terms there, then `hf auth login`") from error
    except RepositoryNotFoundError as error:
        raise IntarsiaError(
            f"{repository}: no such repository on the hub, or a private one; `hf auth login` shows yours"
        ) from error
    except RevisionNotFoundError as error:
        raise IntarsiaError(f"{repository}: no such revision on the hub: {_first_line(error)}") from error
    except OfflineModeIsEnabled as error:
        raise IntarsiaError(f"{repository} {what} the hub: HF_HUB_OFFLINE is set; unset it") from error
    except HFValidationError as error:
        raise IntarsiaError(
            f"{repository!r} is no repository of the hub: {_first_line(error)}; expected organisation/name"
        ) from error
    except HfHubHTTPError as error:
        denied = error.response is not None and error.response.status_code in (401, 403)
        advice = "; `hf auth login` with a token that may write there" if denied else ""
        raise IntarsiaError(f"{repository} {what} the hub: {_first_line(error)}{advice}") from error
    except Exception as error:  # no network, no answer, a full disk
        raise IntarsiaError(f"{repository} {what} the hub: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".:") if lines else type(error).__name__
