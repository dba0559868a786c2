"""Corpora on disk: what is written can be read, equal input gives equal bytes, and damage is detected."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import tarfile
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import webdataset

from cllm4rec_dist.corpus.catalog import Catalog, build_catalog
from cllm4rec_dist.corpus.manifest import MANIFEST_NAME, SPLITS, Manifest
from cllm4rec_dist.corpus.prepare import prepare
from cllm4rec_dist.corpus.recipe import PrepareConfig
from cllm4rec_dist.corpus.shards import Corpus
from cllm4rec_dist.corpus.sources import read_source
from cllm4rec_dist.corpus.writer import write_corpus
from cllm4rec_dist.errors import CorpusError
from tests.corpus.samples import BlankTokenizer, recipe, reviews

SMALL = recipe(examples_per_record=7, records_per_shard=3, max_text_tokens=9)


@pytest.fixture(scope="module")
def catalog() -> Catalog:
    return build_catalog(read_source(SMALL.source), SMALL)


def write(catalog: Catalog, out: Path | str, config: PrepareConfig = SMALL, **options: Any) -> Manifest:
    return write_corpus(catalog, BlankTokenizer(), str(out), config, progress=False, **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def texts(corpus: Corpus) -> list[tuple[int, int, int, list[int]]]:
    texts = []
    for index in range(len(corpus.content)):
        record = corpus.content.read_record(index)
        for n, (kind, user, item) in enumerate(zip(record["kind"], record["users"], record["items"], strict=True)):
            words = record["tokens"][record["offsets"][n] : record["offsets"][n + 1]]
            texts.append((int(kind), int(user), int(item), words.tolist()))
    return texts


def test_what_is_written_is_read(catalog: Catalog, tmp_path: Path) -> None:
    manifest = write(catalog, tmp_path / "c")
    corpus = Corpus.open(str(tmp_path / "c"))
    assert corpus.manifest == manifest
    assert (corpus.num_users, corpus.num_items) == (40, 30)
    assert corpus.users()["user"].to_pylist() == catalog.user_ids.to_list()
    assert corpus.users()["text"].to_pylist() == catalog.user_texts.to_list()
    items = corpus.items()
    assert items["row"].to_pylist() == list(range(30))
    assert items["item"].to_pylist() == catalog.item_ids.to_list()
    assert items["title"].to_pylist() == catalog.item_titles.to_list()
    assert items["description"].to_pylist() == catalog.item_descriptions.to_list()
    for split in SPLITS:
        np.testing.assert_array_equal(corpus.split(split).offsets, getattr(catalog, split).offsets)
        np.testing.assert_array_equal(corpus.split(split).values, getattr(catalog, split).values)
        assert manifest.num_interactions[split] == len(getattr(catalog, split).values)
    assert corpus.interactions.record_sizes.tolist() == [7, 7, 7, 7, 7, 5]
    assert corpus.interactions.num_examples == 40


def test_lists_of_some_users_come_in_the_order_in_which_these_are_named(catalog: Catalog, tmp_path: Path) -> None:
    write(catalog, tmp_path / "c")
    corpus = Corpus.open(str(tmp_path / "c"))
    assert len(corpus.interactions) > 2
    users = np.random.default_rng(0).integers(0, corpus.num_users, 2 * corpus.num_users)  # several times, any order
    for name, lists in zip(("valid", "train"), corpus.splits(("valid", "train"), users), strict=True):
        expected = corpus.split(name).take(users)
        assert lists.offsets.tolist() == expected.offsets.tolist()
        assert lists.values.tolist() == expected.values.tolist()


def test_types_on_disk(catalog: Catalog, tmp_path: Path) -> None:
    write(catalog, tmp_path / "c")
    corpus = Corpus.open(str(tmp_path / "c"))
    types = {name: array.dtype.name for name, array in corpus.interactions.read_record(3).items()}
    offsets, items = {f"{s}_offsets": "int64" for s in SPLITS}, {f"{s}_items": "int32" for s in SPLITS}
    assert types == {"users": "int64"} | offsets | items
    assert {name: array.dtype.name for name, array in corpus.content.read_record(3).items()} == {
        "kind": "uint8",
        "users": "int64",
        "items": "int64",
        "offsets": "int64",
        "tokens": "int32",
    }


def test_content_holds_every_text_once(catalog: Catalog, tmp_path: Path) -> None:
    manifest = write(catalog, tmp_path / "c")
    encode = BlankTokenizer().encode_batch
    written = zip(catalog.reviews.users, catalog.reviews.items, encode(reviews(catalog)), strict=True)
    expected = [(0, int(user), int(item), words[:9]) for user, item, words in written]
    expected += [(1, 0, item, words[:9]) for item, words in enumerate(encode(catalog.item_titles))]
    expected += [(2, 0, item, words[:9]) for item, words in enumerate(encode(catalog.item_descriptions)) if words]
    expected += [(3, user, 0, words[:9]) for user, words in enumerate(encode(catalog.user_texts))]
    corpus = Corpus.open(str(tmp_path / "c"))
    assert texts(corpus) == expected
    assert corpus.content.num_examples == len(expected) == sum(manifest.num_content.values())
    assert manifest.num_content["user_profile"] == 40
    everything = [*reviews(catalog), *catalog.item_titles, *catalog.item_descriptions, *catalog.user_texts]
    longer = sum(len(words) > 9 for words in encode(everything))
    assert manifest.skipped["end of a text longer than 9 words"].count == longer > 0


def test_texts_without_words_are_counted(catalog: Catalog, tmp_path: Path) -> None:
    of_reviews = set(reviews(catalog))

    class ReviewsOnly(BlankTokenizer):
        def encode_batch(self, texts: Any) -> list[list[int]]:
            return [
                words if text in of_reviews else []
                for text, words in zip(texts, super().encode_batch(texts), strict=True)
            ]

    manifest = write_corpus(catalog, ReviewsOnly(), str(tmp_path / "c"), SMALL, progress=False)
    num_described = int((catalog.item_descriptions != "").sum())
    assert 0 < num_described < 30
    assert manifest.skipped["text without words"].count == 30 + num_described + 40
    assert set(manifest.num_content.values()) == {0, len(catalog.reviews.users)}


def test_texts_can_be_left_out(catalog: Catalog, tmp_path: Path) -> None:
    config = recipe(texts={"user_item": False, "item": False, "user": False})
    manifest = write(catalog, tmp_path / "c", config)
    corpus = Corpus.open(str(tmp_path / "c"))
    assert len(corpus.content) == corpus.content.num_examples == 0
    assert manifest.of_kind("content") == ()


def test_same_input_same_bytes(catalog: Catalog, tmp_path: Path) -> None:
    write(catalog, tmp_path / "one")
    write(catalog, tmp_path / "elsewhere" / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "elsewhere" / "two")
    assert (
        Corpus.open(str(tmp_path / "one")).fingerprint == Corpus.open(str(tmp_path / "elsewhere" / "two")).fingerprint
    )


def test_tars_carry_nothing_of_the_machine(catalog: Catalog, tmp_path: Path) -> None:
    write(catalog, tmp_path / "c")
    for path in (tmp_path / "c").rglob("*.tar"):
        with tarfile.open(path) as tar:
            for member in tar:
                assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")


def test_plain_webdataset_reads_the_shards(catalog: Catalog, tmp_path: Path) -> None:
    write(catalog, tmp_path / "c")
    corpus = Corpus.open(str(tmp_path / "c"))
    urls = [f"{tmp_path}/c/{entry.path}" for entry in corpus.manifest.of_kind("interactions")]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert len(samples) == 6
    for index, sample in enumerate(samples):
        assert sample["__key__"] == f"{index:08d}"
        for name, array in corpus.interactions.read_record(index).items():
            np.testing.assert_array_equal(sample[f"{name}.npy"], array)


def test_prepare_goes_all_the_way(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="cllm4rec_dist")
    manifest = prepare(SMALL, BlankTokenizer(), str(tmp_path / "c"), progress=False)
    assert Corpus.open(str(tmp_path / "c")).manifest == manifest
    assert manifest.preparation == SMALL.preparation()
    assert manifest.skipped["review of a held-out interaction"].count > 0
    assert "left out" in caplog.text
    assert manifest.order_columns is None, "invented data have no columns"


def test_a_corpus_of_a_table_knows_the_columns_of_its_orders_and_items(tmp_path: Path) -> None:
    rows = "".join(f"u{index % 6};i{index % 5};{1 + index % 28:02d}/03/2025\n" for index in range(60))
    (tmp_path / "pedidos.csv").write_text(f"cliente;producto;fecha\n{rows}")
    columns = {"user": "cliente", "item": "producto", "timestamp": "fecha", "time_format": "%d/%m/%Y"}
    (tmp_path / "productos.csv").write_text("producto,nombre,color\ni1,jabón,rojo\n")
    texts = {"item": "producto", "title": "nombre", "description": ("color",), "html": True}
    source = {
        "format": "table",
        "interactions": {"path": str(tmp_path / "pedidos.csv"), **columns},
        "items": {"path": str(tmp_path / "productos.csv"), **texts},
    }
    config = PrepareConfig.model_validate({"name": "tienda", "source": source})
    prepare(config, BlankTokenizer(), str(tmp_path / "c"), progress=False)
    manifest = Corpus.open(str(tmp_path / "c")).manifest
    assert manifest.order_columns is not None
    assert manifest.order_columns.model_dump() == columns
    assert manifest.item_columns is not None
    assert manifest.item_columns.model_dump() == texts
    del source["items"]
    config = PrepareConfig.model_validate({"name": "tienda", "source": source})
    assert prepare(config, BlankTokenizer(), str(tmp_path / "d"), progress=False).item_columns is None
    assert b"item_columns" not in (tmp_path / "d" / MANIFEST_NAME).read_bytes(), "as in earlier versions"


def test_any_file_system(catalog: Catalog, tmp_path: Path) -> None:
    write(catalog, "memory://bucket/c")
    write(catalog, "memory://bucket/c", overwrite=True)
    write(catalog, tmp_path / "c")
    remote, local = Corpus.open("memory://bucket/c"), Corpus.open(str(tmp_path / "c"))
    assert remote.fingerprint == local.fingerprint
    assert texts(remote) == texts(local)
    np.testing.assert_array_equal(remote.split("train").values, local.split("train").values)
    fsspec.filesystem("memory").rm("/bucket", recursive=True)


def test_overwrite_is_asked_for_and_replaces_everything(catalog: Catalog, tmp_path: Path) -> None:
    write(catalog, tmp_path / "c")
    with pytest.raises(CorpusError, match="is not empty"):
        write(catalog, tmp_path / "c")
    write(catalog, tmp_path / "c", recipe(texts={"user_item": False, "item": False, "user": False}), overwrite=True)
    assert not (tmp_path / "c" / "content").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["c"]
    Corpus.open(str(tmp_path / "c"))


def test_only_a_corpus_is_overwritten(catalog: Catalog, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(CorpusError, match=r"thesis\.txt"):
        write(catalog, tmp_path, overwrite=True)
    with pytest.raises(CorpusError, match="is a file"):
        write(catalog, tmp_path / "thesis.txt", overwrite=True)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


class Interrupted(BlankTokenizer):
    def encode_batch(self, texts: Any) -> list[list[int]]:
        raise KeyboardInterrupt


@pytest.mark.parametrize("location", ["local", "memory"])
def test_an_interrupted_build_is_no_corpus(catalog: Catalog, tmp_path: Path, location: str) -> None:
    out = str(tmp_path / "c") if location == "local" else "memory://torn/c"
    with pytest.raises(KeyboardInterrupt):
        write_corpus(catalog, Interrupted(), out, SMALL, progress=False)
    with pytest.raises(CorpusError, match="has no readable manifest"):
        Corpus.open(out)
    write(catalog, out, overwrite=True)
    assert Corpus.open(out).num_users == 40


def test_an_interrupted_overwrite_keeps_the_old_corpus(catalog: Catalog, tmp_path: Path) -> None:
    write(catalog, tmp_path / "c")
    with pytest.raises(KeyboardInterrupt):
        write_corpus(catalog, Interrupted(), str(tmp_path / "c"), SMALL, overwrite=True, progress=False)
    assert Corpus.open(str(tmp_path / "c")).num_users == 40


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


SHARD = "content/content-000000.tar"


def test_damage_is_found_on_opening(catalog: Catalog, tmp_path: Path) -> None:
    out = tmp_path / "c"
    for name in [SHARD, "interactions/interactions-000001.tar", "users.parquet", "items.parquet"]:
        write(catalog, out, overwrite=out.exists())
        flip(out / name)
        with pytest.raises(CorpusError, match="sha256"):
            Corpus.open(str(out))
        Corpus.open(str(out), verify=False)
        (out / name).write_bytes((out / name).read_bytes()[:-512])
        with pytest.raises(CorpusError, match=r"bytes, but the manifest says"):
            Corpus.open(str(out), verify=False)
        (out / name).unlink()
        with pytest.raises(CorpusError, match="is named by the manifest but cannot be found"):
            Corpus.open(str(out), verify=False)
        (out / name).write_bytes(b"")


def edit_manifest(out: Path, **changes: Any) -> None:
    path = out / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema_version": 2}, "schema_version: 2 is not 1"),
        ({"num_users": "many"}, "num_users"),
        ({"surprise": 1}, "surprise"),
        ({"files": []}, "one table of users"),
        ({"files": [{"path": "../x", "kind": "users", "num_bytes": 1, "sha256": ""}]}, "plain relative path"),
        ({"files": [{"path": "/etc/x", "kind": "users", "num_bytes": 1, "sha256": ""}]}, "plain relative path"),
        ({"files": [{"path": "a/../../x", "kind": "users", "num_bytes": 1, "sha256": ""}]}, "plain relative path"),
    ],
)
def test_a_manifest_that_is_not_right(catalog: Catalog, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write(catalog, tmp_path / "c")
    edit_manifest(tmp_path / "c", **changes)
    with pytest.raises(CorpusError, match=message):
        Corpus.open(str(tmp_path / "c"))


def test_a_manifest_that_is_no_json(catalog: Catalog, tmp_path: Path) -> None:
    write(catalog, tmp_path / "c")
    for content in (b"{", b"[]", b"\xff", b"{}"):
        (tmp_path / "c" / "manifest.json").write_bytes(content)
        with pytest.raises(CorpusError, match="is not a corpus manifest"):
            Corpus.open(str(tmp_path / "c"))


def test_rows_that_the_manifest_does_not_know(catalog: Catalog, tmp_path: Path) -> None:
    write(catalog, tmp_path / "c")
    edit_manifest(tmp_path / "c", num_users=41)
    with pytest.raises(CorpusError, match="rows, but the manifest says 41"):
        Corpus.open(str(tmp_path / "c")).users()


def replace_shard(out: Path, members: dict[str, bytes], **attributes: Any) -> None:
    """Replace a shard with another tar, and the manifest to match."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            for attribute, value in attributes.items():
                setattr(member, attribute, value)
            tar.addfile(member, io.BytesIO(content))
    (out / SHARD).write_bytes(stream.getvalue())
    files = json.loads((out / "manifest.json").read_text())["files"]
    for entry in files:
        if entry["path"] == SHARD:
            sha256 = hashlib.sha256(stream.getvalue()).hexdigest()
            entry |= {"num_bytes": len(stream.getvalue()), "sha256": sha256, "record_sizes": [1]}
    edit_manifest(out, files=[entry for entry in files if entry["kind"] != "content" or entry["path"] == SHARD])


def npy(array: np.ndarray, **options: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, **options)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("members", "attributes", "message"),
    [
        ({"../../x.users.npy": npy(np.zeros(1))}, {}, "is not a member that a corpus may hold"),
        ({"/x/0.users.npy": npy(np.zeros(1))}, {}, "is not a member that a corpus may hold"),
        ({"0.users.npy": b""}, {"type": tarfile.SYMTYPE, "linkname": "/x"}, "is not a member that a corpus may hold"),
        ({"0.users.npy": npy(np.array([{}], dtype=object), allow_pickle=True)}, {}, "cannot be read"),
        ({"0.users.npy": pickle.dumps([1])}, {}, "cannot be read"),
        ({"0.users.npy": npy(np.zeros(2))}, {}, "2 examples, but the manifest says 1"),
        ({"0.items.npy": npy(np.zeros(2))}, {}, "0 examples, but the manifest says 1"),
        ({"0.users.npy": npy(np.zeros(1)), "1.users.npy": npy(np.zeros(1))}, {}, "2 records, but the manifest says 1"),
    ],
    ids=["escapes", "absolute", "link", "objects", "pickle", "too many", "no users", "records"],
)
def test_shards_that_are_not_ours(
    catalog: Catalog, tmp_path: Path, members: dict[str, bytes], attributes: dict[str, Any], message: str
) -> None:
    write(catalog, tmp_path / "c")
    replace_shard(tmp_path / "c", members, **attributes)
    with pytest.raises(CorpusError, match=message):
        Corpus.open(str(tmp_path / "c")).content.read_record(0)


def test_a_shard_that_breaks_off_after_opening(catalog: Catalog, tmp_path: Path) -> None:
    write(catalog, tmp_path / "c")
    corpus = Corpus.open(str(tmp_path / "c"))
    shard = tmp_path / "c" / SHARD
    shard.write_bytes(shard.read_bytes()[:3000])
    with pytest.raises(CorpusError, match="is not a whole tar file"):
        corpus.content.read_record(0)
    shard.unlink()
    with pytest.raises(CorpusError, match="is not a whole tar file"):
        corpus.content.read_record(0)


def test_record_numbers_outside_are_refused(catalog: Catalog, tmp_path: Path) -> None:
    write(catalog, tmp_path / "c")
    corpus = Corpus.open(str(tmp_path / "c"))
    with pytest.raises(IndexError):
        corpus.interactions.read_record(6)
    with pytest.raises(IndexError):
        corpus.interactions.read_record(-1)


@pytest.mark.parametrize("url", ["nosuchprotocol://x", "ftps4://x"])
def test_a_protocol_that_nobody_knows(catalog: Catalog, url: str) -> None:
    with pytest.raises(CorpusError, match="is on no supported file system"):
        Corpus.open(url)
    with pytest.raises(CorpusError, match="is on no supported file system"):
        write(catalog, url)


def test_a_corpus_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="cllm4rec prepare"):
        Corpus.open(str(tmp_path / "nowhere"))
