"""Folders that are committed as a whole or not at all, on local disks and elsewhere."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from cllm4rec_dist.checkpointing.store import COMMIT, SCHEMA_VERSION, FileEntry, Store
from cllm4rec_dist.errors import CheckpointError, DamagedCheckpointError
from tests.s3 import BUCKET, serve_s3


@pytest.fixture(scope="module")
def s3() -> Iterator[None]:
    with serve_s3():
        yield


@pytest.fixture(params=["path", "file", "memory", pytest.param("s3", marks=pytest.mark.integration)])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "s3":
        request.getfixturevalue("s3")
    urls = {
        "path": f"{tmp_path}/runs",
        "file": f"file://{tmp_path}/runs",
        "memory": f"memory://{secrets.token_hex(8)}",
        "s3": f"s3://{BUCKET}/{secrets.token_hex(8)}",
    }
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


def test_uncommitted_folders_are_swept_and_quarantined_ones_stay(store: Store) -> None:
    for name in ("step-1", "step-2"):
        store.commit(name, write(store, name))
    write(store, "step-3")
    store.quarantine("step-2")
    store.sweep(("step-", "best-"))
    assert store.names("step-") == ["step-1"]
    assert store.quarantined_names("step-") == ["step-2"]
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
    with pytest.raises(CheckpointError, match="is on no supported file system"):
        Store("nosuch://bucket/run")


class Broken(MemoryFileSystem):
    """A file system that raises something else than OSError."""

    protocol = "broken"
    cachable = False

    def info(self, *args: Any, **kwargs: Any) -> Any:
        raise LookupError("no credentials")

    cat_file = get_file = info


@pytest.fixture
def broken() -> Store:
    fsspec.register_implementation("broken", Broken, clobber=True)
    return Store("broken://bucket/run")


@pytest.mark.parametrize(
    "call",
    [
        lambda store: store.names("step-"),
        lambda store: store.quarantined_names("step-"),
        lambda store: store.marker("a"),
        lambda store: store.unseen("a", {"a": FileEntry(num_bytes=1, sha256="0" * 64)}),
        lambda store: store.fetch("a", "a", FileEntry(num_bytes=1, sha256="0" * 64)),
    ],
)
def test_a_store_that_does_not_answer_is_reported_and_is_no_damage(
    broken: Store, call: Callable[[Store], object]
) -> None:
    with pytest.raises(CheckpointError, match=r"LookupError: no credentials.* cannot be read") as refused:
        call(broken)
    assert not isinstance(refused.value, DamagedCheckpointError)


class Watched:
    """A file system that calls `look` before every attribute access."""

    def __init__(self, genuine: fsspec.AbstractFileSystem, look: Callable[[], object]) -> None:
        self._genuine, self._look = genuine, look

    def __getattr__(self, name: str) -> Any:
        self._look()
        return getattr(self._genuine, name)


@pytest.mark.parametrize("kind", ["local", "memory"])
def test_a_writer_killed_at_any_moment_leaves_whole_folders_only(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader can recover from every state of the storage while folders are written and removed."""
    root = str(tmp_path / "runs") if kind == "local" else f"/{secrets.token_hex(8)}"
    url = root if kind == "local" else f"memory:/{root}"
    states: list[dict[str, bytes]] = []
    genuine = Store(url)._fs

    def look() -> None:
        paths = genuine.find(root) if genuine.exists(root) else []
        state = {path: genuine.cat_file(path) for path in paths}
        if not states or state != states[-1]:
            states.append(state)

    def synced(path: Path) -> None:
        look()

    monkeypatch.setattr("cllm4rec_dist.checkpointing.store._sync", synced)
    store = Store(url)
    store._fs = Watched(genuine, look)
    for step in range(1, 4):
        name = f"step-{step}"
        store.commit(name, write(store, name, b"content of " + name.encode()))
        if step > 1:
            store.remove(f"step-{step - 1}")
    look()
    assert len(states) >= 3 * 3 + 2 * 2  # two files and a marker each; a marker and files removed
    recovered = []
    for index, state in enumerate(states):
        copy = Store(f"memory://{secrets.token_hex(8)}")
        for path, content in state.items():
            copy._fs.pipe_file(f"{copy._root}/{path.removeprefix(root).lstrip('/')}", content)
        names = copy.names("step-")
        for name in names:
            for file, entry in copy.marker(name).files.items():
                assert copy.fetch(name, file, entry).read_bytes() == b"content of " + name.encode(), (index, file)
        recovered.append(names[-1] if names else "")
        copy.sweep(("step-",))
        assert copy._folders() == names
    assert recovered == sorted(recovered)
    assert set(recovered) == {"", "step-1", "step-2", "step-3"}
    assert "" not in recovered[recovered.index("step-1") :]
