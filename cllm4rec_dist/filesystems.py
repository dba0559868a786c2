"""Paths as people write them, and any file system that fsspec knows, with errors that can be handled.

A driver of fsspec may raise what it likes: botocore's `NoCredentialsError` is no OSError. Two rules mend that: a URL is
resolved by `locate`, and whatever asks a file system for something does it inside of `as_os_errors`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import fsspec

from cllm4rec_dist.errors import CLLM4RecError

_VARIABLE = re.compile(r"\$(?:(\$)|([a-z_]\w*)|\{(\w+)(?::-([^}]*))?\})", re.ASCII | re.IGNORECASE)


def expand_path(path: str, environ: Mapping[str, str] = os.environ) -> str:
    """Replace `$NAME`, `${NAME}`, `${NAME:-default}` and a leading `~`; `$$` is a dollar sign.

    Raises:
        ValueError: for a variable that is not set or a home that is not known.
    """

    def value(match: re.Match[str]) -> str:
        dollar, bare, braced, default = match.groups()
        if dollar:
            return "$"
        name = bare or braced
        found = environ.get(name) or default
        if found is None:
            raise ValueError(f"environment variable {name} is not set; set it or write ${{{name}:-some/folder}}")
        return found

    expanded = os.path.expanduser(_VARIABLE.sub(value, path))
    if path.startswith("~") and expanded.startswith("~"):
        raise ValueError(f"no home is known for {expanded.split('/')[0]}; write ./{path} for a folder of that name")
    return expanded


def is_url(path: str) -> bool:
    """Whether a path is not a local one, also where `pathlib` has made s3:/bucket/folder of s3://bucket/folder."""
    return "://" in path or re.match(r"[a-z][\w+.-]+:/", path, re.ASCII | re.IGNORECASE) is not None


def locate(field: str, url: str, error: type[CLLM4RecError]) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a folder, file or URL, and the path there. Asks the file system nothing.

    Args:
        field: what the URL is of, for the error.
        url: where.
        error: raised for a file system that is unknown, or whose package is not installed.
    """
    try:
        fs, path = fsspec.core.url_to_fs(str(url))
    except (ValueError, ImportError) as cause:
        raise error(
            field,
            url,
            f"is on no file system that can be used here ({cause})",
            "Give a path or a URL that fsspec knows; some need a package, as s3:// needs `pip install s3fs`.",
        ) from cause
    return fs, path


@contextmanager
def as_os_errors() -> Iterator[None]:
    """Inside, whatever a file system raises is an OSError; our own errors pass.

    Raises:
        OSError: as it was, or around what was raised and with its name.
    """
    try:
        yield
    except (OSError, CLLM4RecError):
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error
