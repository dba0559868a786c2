"""Records a seeded run of both stages, to show that a change of the code changes no bit of it.

    python -m tests.integration.seeded_run before.json --root CLONE_OF_THE_COMMIT_BEFORE
    python -m tests.integration.seeded_run after.json
    python -m tests.integration.seeded_run --compare before.json after.json

Each run is started by torchrun at 1, 2 and 3 ranks, in the form of the demo and in one with most options on. A record
has every number of metrics.jsonl but times, and a digest of each tensor of the last checkpoint.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
VARYING = ("time", "seconds", "per_second", "memory", "eta")
"""Parts of the names of metrics that differ from run to run."""
COMMON = """
corpus: {folder}/corpus
backbone: {folder}/backbone
epochs: 2
batch: {{users: 64, texts: 64}}
optimizer: {{warmup_steps: 4}}
checkpoint: {{every_steps: 1000}}
"""
FORMS = {
    "defaults": {"worlds": (1, 2, 3), "settings": []},
    "options": {
        "worlds": (2,),
        "settings": [
            "adapter.kind=full",
            "activation_checkpointing=true",
            "batch.gradient_accumulation_steps=2",
            "embeddings.comm_dtype=bf16",
            "embeddings.dropout=0.2",
            "head.num_negatives=50",
            "method.shared_user_ratio=0.25",
        ],
    },
}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("record", type=Path, nargs="?", help="JSON file to write")
    options.add_argument("--root", type=Path, default=ROOT, help="clone whose code runs (this one)")
    options.add_argument("--compare", type=Path, nargs=2, metavar=("BEFORE", "AFTER"))
    chosen = options.parse_args()
    if chosen.compare:
        sys.exit(compare(*(json.loads(path.read_text()) for path in chosen.compare)))
    chosen.record.write_text(json.dumps(record(chosen.root.resolve()), indent=1, sort_keys=True))


def record(root: Path) -> dict[str, Any]:
    """Metrics and digests of every run, by `FORM/STAGE at N`."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(root, folder)
        return dict(runs(root, folder))


def prepare(root: Path, folder: Path) -> None:
    """A backbone and a corpus of the demo."""
    command = [sys.executable, "-m", "cllm4rec_dist"]
    sizes = ("hidden_size=32", "num_layers=2", "num_heads=2", "vocab_size=1000")
    execute(root, *command, "build-backbone", "shards/demo.yaml", f"{folder}/backbone", *sizes)
    execute(root, *command, "prepare", "shards/demo.yaml", f"{folder}/corpus", "--tokenizer", f"{folder}/backbone")
    (folder / "run.yaml").write_text(COMMON.format(folder=folder))


def runs(root: Path, folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Pretrain and finetune in every form at every number of ranks."""
    for form, how in FORMS.items():
        for world in how["worlds"]:
            before: list[str] = []
            for stage in ("pretrain", "finetune"):
                output = folder / f"{form}-{world}-{stage}"
                execute(
                    root,
                    str(BIN / "torchrun"),
                    "--standalone",
                    f"--nproc-per-node={world}",
                    f"launch/{stage}.py",
                    "--config",
                    f"{folder}/run.yaml",
                    f"output={output}",
                    *before,
                    *how["settings"],
                )
                before = [f"init_from={output}"]
                yield f"{form}/{stage} at {world}", {"metrics": metrics(output), "tensors": digests(output)}
                sys.stderr.write(f"{form}/{stage} at {world}\n")


def execute(root: Path, *command: str) -> None:
    """Run a command in a clone; its output is shown if it fails."""
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: status {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")


def metrics(output: Path) -> list[dict[str, float]]:
    """Lines of metrics.jsonl without what takes time."""
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [{key: x for key, x in line.items() if not any(part in key for part in VARYING)} for line in lines]


def digests(output: Path) -> dict[str, str]:
    """SHA-256 of the bytes of each tensor of the newest checkpoint, by file and name."""
    newest = max(folder for folder in (output / "checkpoints").iterdir() if folder.name.startswith("step-"))
    found = {}
    for path in sorted(newest.rglob("*.safetensors")):
        with safe_open(path, "numpy") as tensors:
            for name in tensors.keys():  # noqa: SIM118  not a mapping
                content = tensors.get_tensor(name).tobytes()
                found[f"{path.relative_to(newest)}: {name}"] = hashlib.sha256(content).hexdigest()
    return found


def compare(before: dict[str, Any], after: dict[str, Any]) -> int:
    """Say what differs. Names of tensors may: contents are matched. Returns an exit status."""
    different = 0
    for name in sorted(before | after):
        old, new = before.get(name), after.get(name)
        if old is None or new is None:
            problem = "is in one record only"
        elif old["metrics"] != new["metrics"]:
            pairs = zip(old["metrics"], new["metrics"], strict=False)
            first = next(((a, b) for a, b in pairs if a != b), (len(old["metrics"]), len(new["metrics"])))
            problem = f"metrics differ first at {first}"
        elif sorted(old["tensors"].values()) != sorted(new["tensors"].values()):
            problem = f"tensors differ: {[key for key, x in old['tensors'].items() if new['tensors'].get(key) != x]}"
        else:
            same = f"the same {len(old['metrics'])} lines of metrics and {len(old['tensors'])} tensors"
            sys.stdout.write(f"{name}: {same}\n")
            continue
        different += 1
        sys.stdout.write(f"{name}: {problem}\n")
    return int(different > 0)


if __name__ == "__main__":
    main()
