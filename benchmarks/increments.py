"""Bytes and seconds of checkpoints that hold changed rows, beside whole ones of the same run.

    python -m benchmarks.increments                  500,000 users, a checkpoint every 50 steps, each fourth one whole

A run of several ranks trains a small decoder with large tables. Sizes and times of saving are those that it logs; the
times of reading are those of one process that reads every tensor with its moments, digests included.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from safetensors import safe_open

from benchmarks.catalogs import make_corpus
from benchmarks.common import ROOT, parser, pretrain_command, show, show_table, write_json
from cllm4rec_dist.checkpointing.format import Checkpoint, shard_file
from cllm4rec_dist.checkpointing.store import Store
from cllm4rec_dist.distributed.adam import MOMENTS

_SAVED = re.compile(r"checkpoint (step-\d+): copied in ([\d.]+) s, ([\d.]+) MB written in ([\d.]+) s")
_TABLES = ("collaborative.users", "content.users", "collaborative.items", "content.items")


def main() -> None:
    options = parser("increments", __doc__)
    options.add_argument("--users", type=int, default=500_000)
    options.add_argument("--items", type=int, default=100_000)
    options.add_argument("--hidden", type=int, default=64, help="width of the decoder and of every row (%(default)s)")
    options.add_argument("--ranks", type=int, default=2)
    options.add_argument("--every", type=int, default=50, help="steps between checkpoints (%(default)s)")
    options.add_argument("--full-every", type=int, default=4)
    options.add_argument("--batch-users", type=int, default=128)
    options.add_argument("--batch-texts", type=int, default=32)
    options.add_argument("--negatives", type=int, default=1000, help="0 for a softmax over all items (%(default)s)")
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        log = train(Path(folder), chosen)
        store = Store(f"{folder}/run/checkpoints")
        saves = [
            {
                "name": name,
                "copied_s": float(copied),
                "megabytes": float(megabytes),
                "written_s": float(written),
                **read(store, name),
            }
            for name, copied, megabytes, written in _SAVED.findall(log)
        ]
    show_table(
        ["checkpoint", "rows in it", "MB", "copied (s)", "written (s)", "read (s)"],
        [
            [
                f"{save['name']}, {'whole' if save['is_whole'] else 'changed rows'}",
                f"{100 * save['rows'] / save['all_rows']:.1f} %",
                f"{save['megabytes']:.0f}",
                f"{save['copied_s']:.2f}",
                f"{save['written_s']:.2f}",
                f"{save['read_s']:.2f}",
            ]
            for save in saves
        ],
    )
    options_used = {key: value for key, value in vars(chosen).items() if key != "json"}
    write_json(chosen.json, {"options": options_used, "saves": saves})


def train(folder: Path, chosen: Any) -> str:
    """Build a corpus and train one cycle of checkpoints, and the whole one after it; return the log."""
    make_corpus(folder, chosen.users, chosen.items, chosen.hidden)
    settings = {
        "head": {"num_negatives": chosen.negatives},
        "batch": {"users": chosen.batch_users, "texts": chosen.batch_texts},
        "max_steps": chosen.every * (chosen.full_every + 1),
        "checkpoint": {"every_steps": chosen.every, "keep": 1000, "full_every": chosen.full_every},
    }
    command = pretrain_command(folder, chosen.ranks, settings)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        show(done.stdout[-2000:] + done.stderr[-2000:])
        raise SystemExit(done.returncode)
    return done.stdout + done.stderr


def read(store: Store, name: str) -> dict[str, Any]:
    """Read all tables of a checkpoint; return the seconds and how many rows its own files hold."""
    started = time.perf_counter()
    opened = Checkpoint.open(Store(store.url), name)  # a new store has verified nothing yet
    num_read = 0
    for table in _TABLES:
        size = opened.metadata.num_user_rows if table.endswith("users") else opened.metadata.num_items
        for tensor in (table, *(f"{table}.{key}" for key in MOMENTS)):
            assert opened.rows(tensor, size, 0, size) is not None
        num_read += size
    seconds = time.perf_counter() - started
    stored = sum(num_stored(opened, table) for table in _TABLES)
    return {"read_s": seconds, "rows": stored, "all_rows": num_read, "is_whole": opened.base is None}


def num_stored(opened: Checkpoint, table: str) -> int:
    """Count the rows of a table in a checkpoint's own files."""
    num_rows = 0
    for rank in range(opened.metadata.world_size):
        with safe_open(opened.file(shard_file(rank, opened.metadata.world_size)), framework="pt") as tensors:
            num_rows += tensors.get_slice(table).get_shape()[0]
    return num_rows


if __name__ == "__main__":
    main()
