"""Runs whose corpus and checkpoints are in an object store, against a server that speaks S3."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cllm4rec_dist.checkpointing.format import Checkpoint
from cllm4rec_dist.checkpointing.store import Store
from cllm4rec_dist.corpus.shards import Corpus
from tests.harness import make_backbone, make_catalog, make_corpus, run_ranks
from tests.s3 import BUCKET, get, put, serve_s3
from tests.training import Made, make_config, metrics, refused, run

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def s3() -> Iterator[None]:
    with serve_s3():
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, s3: None) -> Made:
    """A corpus and a backbone, the corpus in the store."""
    folder = tmp_path_factory.mktemp("s3")
    catalog = make_catalog()
    backbone = make_backbone(folder / "backbone", catalog)
    return folder, make_corpus(f"s3://{BUCKET}/corpus", catalog, backbone), str(backbone)


@pytest.mark.parametrize("full_every", [1, 2])
def test_a_run_on_s3_goes_on_at_other_world_sizes_and_passes_over_damage(
    made: Made, tmp_path: Path, full_every: int
) -> None:
    local = make_config(made, tmp_path / "local", epochs=4)
    run_ranks(2, run, local)
    folder = f"s3://{BUCKET}/run-{full_every}/checkpoints"
    changes = {"epochs": 4, "checkpoint": {"dir": folder, "every_steps": 3, "keep": 3, "full_every": full_every}}
    config = make_config(made, tmp_path / "run", **changes)
    run_ranks(2, run, config.model_copy(update={"max_steps": 6}))
    store = Store(folder)
    assert store.names("step-") == ["step-00000003", "step-00000006"]
    assert (Checkpoint.open(store, "step-00000006").base is None) == (full_every == 1)
    shard = f"{folder}/step-00000006/shard-00001-of-00002.safetensors"
    content = bytearray(get(shard))
    content[-1] ^= 1
    put(shard, bytes(content))
    run_ranks(3, run, config.model_copy(update={"max_steps": 9}))
    assert store.quarantined_names("step-") == ["step-00000006"]
    run_ranks(1, run, config)
    assert store.names("step-")[-1] == "step-00000012"
    assert not (tmp_path / "run" / "checkpoints").exists()
    losses = {line["step"]: line["loss"] for line in metrics(tmp_path / "run")}
    wanted = {line["step"]: line["loss"] for line in metrics(tmp_path / "local")}
    assert losses == pytest.approx(wanted, rel=2e-4)


@pytest.mark.parametrize("missing", ["credentials", "server"])
def test_a_store_out_of_reach_is_one_message(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    assert Corpus.open(made[1]).num_users
    config = make_config(made, tmp_path / "run", checkpoint={"dir": "s3://elsewhere/run"})
    if missing == "credentials":
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    else:
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    for message in run_ranks(1, refused, config):
        assert message.startswith("corpus: 's3://bucket/corpus' has no readable manifest.json")
        assert {"credentials": "Unable to locate credentials", "server": "Could not connect"}[missing] in message
