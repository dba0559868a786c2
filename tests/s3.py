"""An S3 server of a test's own: it speaks the protocol over HTTP and keeps its objects in memory."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager

import fsspec
import pytest
from botocore.exceptions import BotoCoreError
from s3fs import S3FileSystem

from tests.harness import free_port
from tests.integration.runs import BIN

BUCKET = "bucket"


@contextmanager
def serve_s3() -> Iterator[dict[str, str]]:
    """Start a server with one bucket; the environment by which s3fs finds it, which is set meanwhile."""
    port = free_port()
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
    }
    server = subprocess.Popen(
        [str(BIN / "moto_server"), "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            S3FileSystem.clear_instance_cache()  # which knows an instance by its arguments, not by the environment
            _make_bucket()
            yield environment
            S3FileSystem.clear_instance_cache()
    finally:
        server.kill()
        server.wait()


def _make_bucket() -> None:
    for _ in range(60):
        try:
            S3FileSystem(skip_instance_cache=True).mkdir(BUCKET)
        except (OSError, BotoCoreError):
            time.sleep(0.5)
        else:
            return
    raise TimeoutError("the S3 server does not answer")


def put(url: str, content: bytes) -> None:
    """Replace an object."""
    with fsspec.open(url, "wb") as file:
        file.write(content)


def get(url: str) -> bytes:
    """An object's content."""
    with fsspec.open(url, "rb") as file:
        content: bytes = file.read()
    return content
