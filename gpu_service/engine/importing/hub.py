"""Downloads the files of one hub model that training needs, and nothing else; no code, no pickle.

It is used only when a hub id was asked for by name: no other source falls back to it.
"""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from gpu_service.engine.importing.directory import OPTIONAL_FILES
from gpu_service.engine.importing.errors import ImportRefused, Reason
from gpu_service.engine.importing.inspection import CONFIG_FILES, INDEX_FILE

# No sub-directories: some hubs keep a second copy of the weights in one.
_WANTED = [*CONFIG_FILES, *OPTIONAL_FILES, INDEX_FILE, "model*.safetensors"]


def read_token(path: Path) -> str:
    """The token that a file holds; its text never reaches a message."""
    try:
        token = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ImportRefused(Reason.INVALID_TOKEN_FILE, f"the token file {path} could not be read") from error
    if not token or len(token.split()) != 1:
        raise ImportRefused(Reason.INVALID_TOKEN_FILE, f"the token file {path} does not hold one token")
    return token


def download_from_hub(hub_id: str, revision: str | None, token: str | None, destination: Path) -> None:
    """Fill the empty directory `destination`; `token=None` sends none, whatever the machine has stored."""
    try:
        snapshot_download(
            hub_id,
            revision=revision,
            token=token if token is not None else False,
            allow_patterns=_WANTED,
            local_dir=destination,
        )
    except GatedRepoError as error:
        raise ImportRefused(
            Reason.DOWNLOAD_FAILED, f"{hub_id} is gated: accept its terms at the hub and give a --token-file"
        ) from error
    except RevisionNotFoundError as error:
        raise ImportRefused(Reason.SOURCE_NOT_FOUND, f"{hub_id} has no revision {revision}") from error
    except RepositoryNotFoundError as error:
        raise ImportRefused(
            Reason.SOURCE_NOT_FOUND, f"the hub knows no {hub_id}, or it is private and no token opens it"
        ) from error
    except HFValidationError as error:
        raise ImportRefused(Reason.SOURCE_NOT_FOUND, f"{hub_id!r} is not a hub id: {error}") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        # Its own message may span lines and name the machine's cache; the kind of failure is what helps.
        first_line = str(error).strip().partition("\n")[0]
        raise ImportRefused(
            Reason.DOWNLOAD_FAILED, f"{hub_id} could not be downloaded: {type(error).__name__}: {first_line}"
        ) from error
