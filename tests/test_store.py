"""Folders that exist as a whole or not at all, on local disks and elsewhere."""

from __future__ import annotations

import json
import secrets
from pathlib import Path

import pytest

from cllm4rec_dist.errors import CheckpointError, DamagedCheckpointError
from cllm4rec_dist.store import COMMIT, SCHEMA_VERSION, FileEntry, Store


@pytest.fixture(params=["path", "file", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    urls = {"path": f"{tmp_path}/runs", "file": f"file://{tmp_path}/runs", "memory": f"memory://{secrets.token_hex(8)}"}
    return Store(urls[request.param])


def write(store: Store, name: str, content: bytes = b"content") -> dict[str, FileEntry]:
    return {file: store.write(name, file, lambda path: path.write_bytes(content)) for file in ("a.bin", "b.bin")}


def put(store: Store, name: str, file: str, content: bytes) -> None:
    store._fs.makedirs(f"{store._root}/{name}", exist_ok=True)
    store._fs.pipe_file(f"{store._root}/{name}/{file}", content)


def test_a_folder_is_there_from_its_marker_on(store: Store) -> None:
    assert store.names("step-") == []
    files = write(store, "step-2")
    assert store.names("step-") == []
    store.commit("step-2", files)
    store.commit("step-1", write(store, "step-1"))
    store.commit("best-1", write(store, "best-1"))
    assert store.names("step-") == ["step-1", "step-2"]
    assert store.marker("step-2").files == files
    assert store.fetch("step-2", "a.bin", files["a.bin"]).read_bytes() == b"content"


def test_leftovers_are_swept_and_damaged_folders_stay_for_a_look(store: Store) -> None:
    for name in ("step-1", "step-2"):
        store.commit(name, write(store, name))
    write(store, "step-3")
    store.set_aside("step-2")
    store.sweep(("step-", "best-"))
    assert store.names("step-") == ["step-1"]
    assert store.set_aside_names("step-") == ["step-2"]
    assert store._folders() == ["step-1", "step-2"]
    store.remove("step-1")
    assert store._folders() == ["step-2"]


@pytest.mark.parametrize("content", [b"", b"conten", b"Content", b"content and more"])
def test_a_changed_file_is_damage(store: Store, content: bytes) -> None:
    files = write(store, "step-1")
    store.commit("step-1", files)
    assert store.unseen("step-1", files) == []
    put(store, "step-1", "b.bin", content)
    assert store.unseen("step-1", files) == ([] if len(content) == 7 else ["b.bin"])
    with pytest.raises(DamagedCheckpointError, match="is not what was committed"):
        store.fetch("step-1", "b.bin", files["b.bin"])


def test_a_missing_file_is_damage(store: Store) -> None:
    files = write(store, "step-1")
    store.commit("step-1", files)
    store._fs.rm_file(f"{store._root}/step-1/a.bin")
    assert store.unseen("step-1", files) == ["a.bin"]
    with pytest.raises(DamagedCheckpointError, match="was committed but is not there"):
        store.fetch("step-1", "a.bin", files["a.bin"])


ENTRY = {"num_bytes": 1, "sha256": "0" * 64}
BAD_MARKERS = {
    "not JSON": b"{",
    "not an object": b"[]",
    "empty": b"",
    "not text": b"\xff\xfe",
    "no version": json.dumps({"files": {}}).encode(),
    "version of another type": json.dumps({"schema_version": "two", "files": {}}).encode(),
    "no files": json.dumps({"schema_version": SCHEMA_VERSION}).encode(),
    "unknown key": json.dumps({"schema_version": SCHEMA_VERSION, "files": {}, "more": 1}).encode(),
    "negative size": json.dumps({"schema_version": SCHEMA_VERSION, "files": {"a": ENTRY | {"num_bytes": -1}}}).encode(),
    "digest": json.dumps({"schema_version": SCHEMA_VERSION, "files": {"a": ENTRY | {"sha256": "x"}}}).encode(),
} | {
    f"escape by {name!r}": json.dumps({"schema_version": SCHEMA_VERSION, "files": {name: ENTRY}}).encode()
    for name in ("../a", "/etc/passwd", "a/b", "..", "", "a\\b", "a\0b", ".hidden")
}


@pytest.mark.parametrize("kind", BAD_MARKERS)
def test_a_marker_that_makes_no_sense_is_damage(store: Store, kind: str) -> None:
    put(store, "step-1", COMMIT, BAD_MARKERS[kind])
    with pytest.raises(DamagedCheckpointError, match="is not readable"):
        store.marker("step-1")


@pytest.mark.parametrize("version", [1, 3])
def test_another_schema_is_refused_and_is_no_damage(store: Store, version: int) -> None:
    put(store, "step-1", COMMIT, json.dumps({"schema_version": version, "new": 1}).encode())
    with pytest.raises(CheckpointError, match=f"schema_version: {version} is not {SCHEMA_VERSION}") as refused:
        store.marker("step-1")
    assert not isinstance(refused.value, DamagedCheckpointError)


def test_an_unknown_file_system_is_refused() -> None:
    with pytest.raises(CheckpointError, match="is on no file system"):
        Store("nosuch://bucket/run")
