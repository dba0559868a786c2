"""Examples per second of the stream, compared with `webdataset` on the same shards, and the wait of a training step.

    python -m benchmarks.stream                      on a random corpus
    python -m benchmarks.stream --corpus shards/amazon-beauty --backbone backbones/amazon-beauty

Each form reads every user and every text once, in batches of both, and makes tensors of shuffled pretraining documents.
The peer is what a user of webdataset writes: decode the required arrays of the records, split them into examples,
shuffle these in a buffer, make documents one by one, and pad them to the longest of the batch; in the main process, and
in two persistent workers of a DataLoader. Forms take turns, and must yield equally many tokens. Decoding alone is
measured too. Last, the balance of tokens over ranks is compared with a split by number of examples.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset as wds
from torch import Tensor

from benchmarks.catalogs import make_corpus
from benchmarks.common import parser, run_config, show, show_table, write_json
from cllm4rec_dist.corpus.loader import BatchLoader
from cllm4rec_dist.corpus.prompts import CONTENT_PROMPTS, RECOMMENDATION_PROMPT, ContentKind, PromptBuilder
from cllm4rec_dist.corpus.shards import Corpus
from cllm4rec_dist.corpus.stream import prefetch
from cllm4rec_dist.corpus.tokenizer import TokenSpace, WordTokenizer
from cllm4rec_dist.distributed.engine import start_world
from cllm4rec_dist.distributed.topology import World
from cllm4rec_dist.step import train_step
from cllm4rec_dist.system import assemble, init_embeddings
from tests.documents import documents_of_step

NEEDED = {
    "interactions": ["users.npy", "train_offsets.npy", "train_items.npy"],
    "content": ["kind.npy", "users.npy", "items.npy", "offsets.npy", "tokens.npy"],
}
BUFFER = 16_384
"""Shuffle buffer of the peer, as large as our window of 64 records with 256 examples."""

Sample = dict[str, Any]
Pair = tuple[np.ndarray, np.ndarray]


def histories(samples: Iterable[Sample]) -> Iterator[tuple[int, np.ndarray]]:
    """Yield each user and the user's items."""
    for sample in samples:
        offsets, items = sample["train_offsets.npy"], sample["train_items.npy"]
        for n, user in enumerate(sample["users.npy"]):
            yield int(user), items[offsets[n] : offsets[n + 1]]


def texts(samples: Iterable[Sample]) -> Iterator[tuple[int, int, int, np.ndarray]]:
    """Yield kind, user, item and words of each text."""
    for sample in samples:
        offsets, tokens = sample["offsets.npy"], sample["tokens.npy"]
        columns = (sample[f"{name}.npy"].tolist() for name in ("kind", "users", "items"))
        for n, (kind, user, item) in enumerate(zip(*columns, strict=True)):
            yield kind, user, item, tokens[offsets[n] : offsets[n + 1]]


class Prompts:
    """Makes the peer's documents one by one: token ids, and labels of predicted tokens."""

    def __init__(self, tokenizer: WordTokenizer, space: TokenSpace, max_history: int) -> None:
        self.space, self.max_history = space, max_history
        self.random = np.random.default_rng()
        begin = RECOMMENDATION_PROMPT.split(" {items}")[0]

        def encode(text: str) -> np.ndarray:
            tokens = tokenizer.encode(text.format(user="<user_0>", item="<item_0>"), space)
            return np.array([*tokenizer.prefix, *tokens])

        self.history = encode(begin)
        self.content = {int(k): encode(CONTENT_PROMPTS[k].replace(" {item}", "{item}")) for k in ContentKind}

    def collaborative(self, example: tuple[int, np.ndarray]) -> Pair:
        user, items = example
        prompt = self.history + user * (self.history == self.space.first_user)
        return self._labelled(prompt, self.space.first_item + self.random.permutation(items)[: self.max_history])

    def text(self, example: tuple[int, int, int, np.ndarray]) -> Pair:
        kind, user, item, words = example
        prompt = self.content[kind]
        prompt = prompt + user * (prompt == self.space.first_user) + item * (prompt == self.space.first_item)
        return self._labelled(prompt, words)

    def _labelled(self, prompt: np.ndarray, main: np.ndarray) -> Pair:
        tokens = np.concatenate([prompt, main])
        labels = tokens.copy()
        labels[: len(prompt)] = -100
        return tokens, labels


def padded(batch: list[Pair]) -> dict[str, Tensor]:
    """Pad documents to the longest one."""
    shape = len(batch), max(len(tokens) for tokens, _ in batch)
    tokens, labels = np.zeros(shape, np.int64), np.full(shape, -100, np.int64)
    mask = np.zeros(shape, np.int64)
    for row, (token_ids, targets) in enumerate(batch):
        length = len(token_ids)
        tokens[row, :length], labels[row, :length], mask[row, :length] = token_ids, targets, 1
    return {"tokens": torch.from_numpy(tokens), "labels": torch.from_numpy(labels), "mask": torch.from_numpy(mask)}


class Peer:
    """Reads users and texts with webdataset."""

    def __init__(self, corpus: Corpus, prompts: Prompts, users: int, num_texts: int, workers: int) -> None:
        self._loaders = [
            self._loader(corpus, kind, split, compose, size, workers)
            for kind, split, compose, size in (
                ("interactions", histories, prompts.collaborative, users),
                ("content", texts, prompts.text, num_texts),
            )
        ]

    @staticmethod
    def _loader(
        corpus: Corpus, kind: str, split: Callable[..., Any], compose: Callable[..., Pair], size: int, workers: int
    ) -> wds.WebLoader:
        dataset = (
            wds.WebDataset(urls(corpus, kind), shardshuffle=1000, empty_check=False)
            .decode(only=NEEDED[kind])
            .compose(split)
            .shuffle(BUFFER)
            .map(compose)
            .batched(size, collation_fn=padded)
        )
        more = {"persistent_workers": True, "prefetch_factor": 4} if workers else {}
        return wds.WebLoader(dataset, batch_size=None, num_workers=workers, **more)

    def epoch(self) -> int:
        """Read everything once; return the number of tokens."""
        return sum(int(batch["mask"].sum()) for loader in self._loaders for batch in loader)


def urls(corpus: Corpus, kind: str) -> list[str]:
    return [f"{corpus.url}/{entry.path}" for entry in corpus.manifest.of_kind(kind)]


def decode_all(corpus: Corpus) -> int:
    """Decode all records with webdataset, without making documents."""
    for kind, only in NEEDED.items():
        for _ in wds.WebDataset(urls(corpus, kind), shardshuffle=1000).decode(only=only):
            pass
    return 0


def our_epoch(source: BatchLoader, num_steps: int) -> int:
    """Read an epoch, and the examples that fill its last batch; return the number of tokens."""
    tokens = 0
    for batch in prefetch(source.make, 0, num_steps):
        for part in batch.micro_batches:
            tokens += part.num_tokens
    return tokens


def speeds(chosen: argparse.Namespace) -> dict[str, Any]:
    """Examples per second of every form, over whole epochs in turns."""
    corpus, tokenizer = Corpus.open(chosen.corpus, verify=False), WordTokenizer.load(chosen.backbone)
    space = TokenSpace(len(tokenizer), corpus.num_users, corpus.num_items)
    # As many batches of texts as of users, so that both end with their epoch.
    num_steps = -(-corpus.num_users // chosen.users)
    num_texts = -(-corpus.content.num_examples // num_steps)
    config = run_config(chosen, "pretrain", users=chosen.users, texts=num_texts)
    prompts = PromptBuilder(tokenizer, space, config.method, config.seed)
    source = BatchLoader(corpus, prompts, config, World(0, 1, 0, torch.device("cpu")))
    prompts = Prompts(tokenizer, space, config.method.max_history)
    peer = partial(Peer, corpus, prompts, chosen.users, num_texts)
    forms: dict[str, Callable[[], int]] = {
        "webdataset": peer(0).epoch,
        "webdataset, 2 workers": peer(2).epoch,
        "webdataset, records decoded only": lambda: decode_all(corpus),
        "ours": lambda: our_epoch(source, num_steps),
    }
    num_examples = corpus.num_users + corpus.content.num_examples
    times: dict[str, list[float]] = {name: [] for name in forms}
    tokens = dict.fromkeys(forms, 0)
    for repeat in range(chosen.repeats + 1):
        for name, run in forms.items():
            started = time.perf_counter()
            tokens[name] = run()
            if repeat:  # the first one warms up
                times[name].append(time.perf_counter() - started)
    assert tokens["webdataset"] == tokens["webdataset, 2 workers"] <= tokens["ours"] <= 1.01 * tokens["webdataset"]
    best = min(("webdataset", "webdataset, 2 workers"), key=lambda name: statistics.median(times[name]))
    ratios = {name: [b / a for a, b in zip(taken, times[best], strict=True)] for name, taken in times.items()}
    return {
        "batch": {"users": chosen.users, "texts": num_texts},
        "examples": num_examples,
        "tuned_peer": best,
        "forms": {
            name: {
                "examples_per_second": num_examples / statistics.median(taken),
                "ratio": statistics.median(ratios[name]),
                "ratio_range": [min(ratios[name]), max(ratios[name])],
            }
            for name, taken in times.items()
        },
    }


def imbalance(chosen: argparse.Namespace, size: int) -> dict[str, float]:
    """Largest number of tokens of a rank over the mean, for a split by number of examples and for ours."""
    corpus, tokenizer = Corpus.open(chosen.corpus, verify=False), WordTokenizer.load(chosen.backbone)
    config = run_config(chosen, "pretrain", users=chosen.users, texts=chosen.texts)
    prompts = PromptBuilder(
        tokenizer, TokenSpace(len(tokenizer), corpus.num_users, corpus.num_items), config.method, config.seed
    )
    worlds = [World(rank, size, rank, torch.device("cpu")) for rank in range(size)]
    whole = BatchLoader(corpus, prompts, config, World(0, 1, 0, torch.device("cpu")))
    ranks = [BatchLoader(corpus, prompts, config, world) for world in worlds]
    by_count, by_tokens = [], []
    for step in range(chosen.steps):
        lengths = [np.array([len(d.token_ids) for d in documents]) for documents in documents_of_step(whole, step)]
        for lists in lengths:
            np.random.default_rng(step).shuffle(lists)  # documents are sorted by length
        shares = [sum(n[slice(*world.local_range(0, len(n)))].sum() for n in lengths) for world in worlds]
        by_count.append(max(shares) / np.mean(shares))
        tokens = [sum(batch.num_tokens for batch in source.make(step).micro_batches) for source in ranks]
        assert sum(tokens) == sum(shares)
        by_tokens.append(max(tokens) / np.mean(tokens))
    return {"by_count": float(np.mean(by_count)), "by_tokens": float(np.mean(by_tokens))}


def waiting(chosen: argparse.Namespace, stage: str) -> dict[str, float]:
    """Time that training steps of one rank wait for their batches, and time to make a batch."""
    config = run_config(chosen, stage, users=chosen.users, texts=chosen.texts)
    world = start_world()
    system = assemble(config, world)
    init_embeddings(system)
    source = BatchLoader(system.corpus, system.prompts, config, world)
    made, waited, stepped = [], [], []

    def make(step: int) -> Any:
        started = time.perf_counter()
        batch = source.make(step)
        made.append(time.perf_counter() - started)
        return batch

    batches = prefetch(make, 0, chosen.steps + 1)
    for step in range(chosen.steps + 1):
        started = time.perf_counter()
        batch = next(batches)
        ready = time.perf_counter()
        system.train(True)
        train_step(system, batch.micro_batches, 1.0)
        if step:  # the first batch is not prefetched
            waited.append(ready - started)
            stepped.append(time.perf_counter() - started)
    return {
        "step_seconds": statistics.median(stepped),
        "waited_share": sum(waited) / sum(stepped),
        "make_seconds": statistics.median(made),
        "make_seconds_most": max(made),
    }


def main() -> None:
    options = parser("stream", __doc__)
    options.add_argument("--corpus", help="a corpus; a random one if left out")
    options.add_argument("--backbone", help="its backbone")
    options.add_argument("--examples", type=int, default=50_000, help="users, and texts, of a random corpus")
    options.add_argument("--users", type=int, default=256, help="users of a batch")
    options.add_argument("--texts", type=int, default=64, help="texts of a batch of the steps")
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--steps", type=int, default=20)
    chosen = options.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    with tempfile.TemporaryDirectory() as folder:
        if chosen.corpus is None:
            chosen.corpus, chosen.backbone = f"{folder}/corpus", f"{folder}/backbone"
            make_corpus(Path(folder), chosen.examples, 20_000, 64, num_texts=chosen.examples)
        results = speeds(chosen)
        show(f"batches of {results['batch']}; ratios to {results['tuned_peer']}")
        show_table(
            ["stream", "examples/s", "ratio", "lowest", "highest"],
            [
                [name, f"{f['examples_per_second']:,.0f}", *(f"{r:.2f}" for r in (f["ratio"], *f["ratio_range"]))]
                for name, f in results["forms"].items()
            ],
        )
        balance = {size: imbalance(chosen, size) for size in (2, 4, 8)}
        show_table(
            ["ranks", "most tokens of a rank over the mean, by examples", "by tokens"],
            [[size, f"{b['by_count']:.3f}", f"{b['by_tokens']:.3f}"] for size, b in balance.items()],
        )
        shares = {stage: waiting(chosen, stage) for stage in ("pretrain", "finetune")}
        show_table(
            ["stage", "step", "waited for its batch", "making a batch", "most"],
            [
                [
                    stage,
                    f"{s['step_seconds']:.3f} s",
                    f"{s['waited_share']:.3%}",
                    f"{1e3 * s['make_seconds']:.1f} ms",
                    f"{1e3 * s['make_seconds_most']:.0f} ms",
                ]
                for stage, s in shares.items()
            ],
        )
    write_json(chosen.json, results | {"steps": shares, "balance": balance})


if __name__ == "__main__":
    main()
