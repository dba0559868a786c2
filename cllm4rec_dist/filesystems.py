"""Expand paths, and access fsspec's file systems with uniform errors.

An fsspec driver may raise any exception: botocore's `NoCredentialsError` is no OSError. So URLs are resolved with
`locate`, and file systems are accessed within `as_os_errors`.
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
        ValueError: if a variable is not set or a home folder is unknown.
    """

    def value(match: re.Match[str]) -> str:
        dollar, bare, braced, default = match.groups()
        if dollar:
            return "$"
        name = bare or braced
        text = environ.get(name) or default
        if text is None:
            raise ValueError(f"environment variable {name} is not set; set it or write ${{{name}:-some/folder}}")
        return text

    expanded = os.path.expanduser(_VARIABLE.sub(value, path))
    if path.startswith("~") and expanded.startswith("~"):
        raise ValueError(f"the home of {expanded.split('/')[0]} is unknown; write ./{path} for a folder of that name")
    return expanded


def is_url(path: str) -> bool:
    """True for a URL, also one that `pathlib` has shortened from s3://bucket/folder to s3:/bucket/folder."""
    return "://" in path or re.match(r"[a-z][\w+.-]+:/", path, re.ASCII | re.IGNORECASE) is not None


def locate(field: str, url: str, error: type[CLLM4RecError]) -> tuple[fsspec.AbstractFileSystem, str]:
    """Return the file system of a path or URL, and the path on it, without accessing it.

    Args:
        field: setting or option with the URL, for the error.
        url: path or URL.
        error: type to raise if the file system is unknown or its package is not installed.
    """
    try:
        fs, path = fsspec.core.url_to_fs(str(url))
    except (ValueError, ImportError) as cause:
        raise error(
            field,
            url,
            f"is on no supported file system ({cause})",
            "Give a path or a URL that fsspec supports; some need a package: s3:// needs `pip install s3fs`.",
        ) from cause
    return fs, path


@contextmanager
def as_os_errors() -> Iterator[None]:
    """Convert exceptions of a file system to OSError; CLLM4RecErrors pass unchanged.

    Raises:
        OSError: the original one, or one with the name and message of the original exception.
    """
    try:
        yield
    except (OSError, CLLM4RecError):
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error
