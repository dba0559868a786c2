"""Upload of a folder to a model repository on the Hugging Face hub.

The repository is created, and its visibility checked, before anything is exported, so that a token without write access
or a name in use fails early. Files of an earlier export that this one does not have are deleted, so that users who are
no longer exported do not remain. (They remain in the repository's history.)
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi

from cllm4rec_dist.errors import CLLM4RecError, ConfigError

logger = logging.getLogger(__name__)


def create_repository(name: str, *, private: bool) -> None:
    """Create a model repository, or use the existing one.

    Args:
        name: ORG/NAME.
        private: create it as private, and reject an existing public one. If False, the organisation's default applies.

    Raises:
        ConfigError: if the hub refuses or cannot be reached.
    """
    api = HfApi()
    with _hub_errors("--push", name, "Check the name, and that the token may write there (`hf auth whoami`)."):
        api.create_repo(name, repo_type="model", private=private or None, exist_ok=True)
        if private and not api.repo_info(name, repo_type="model").private:
            raise ConfigError(
                "--private", name, "exists already and is public", "Choose another name, or make it private first."
            )


def upload(folder: Path, name: str) -> str:
    """Replace the contents of a repository with the files of `folder`; return the URL of the commit.

    Raises:
        ConfigError: if the hub refuses or cannot be reached.
    """
    with _hub_errors("--push", name, f"{folder} is complete: try again with `hf upload {name} {folder} --delete '*'`."):
        commit = HfApi().upload_folder(
            repo_id=name,
            repo_type="model",
            folder_path=folder,
            commit_message="Export of cllm4rec_dist",
            delete_patterns="*",
        )
    logger.info("uploaded to %s", commit.commit_url)
    return str(commit.commit_url)


@contextmanager
def _hub_errors(field: str, value: str, cure: str) -> Iterator[None]:
    try:
        yield
    except CLLM4RecError:
        raise
    except Exception as error:  # from the hub, its client or the network
        reason = " ".join(str(error).split())
        raise ConfigError(field, value, f"failed at the hub ({type(error).__name__}: {reason})", cure) from error
