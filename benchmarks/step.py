"""A whole training step against the same method written with Hugging Face alone, in one run.

    python -m benchmarks.step --corpus shards/amazon-beauty --backbone backbones/amazon-beauty

The peer is what one would write for one machine: the decoder from transformers, batches padded to their longest
document, `nn.Embedding` tables and dense heads over the predicted positions, torch's
cross-entropy and fused AdamW. Both read the same documents from the same stream, both use all cores. Steps of the two
take turns, so that whatever else the machine does hits both. Real tokens are counted, padding is not.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import parser, tell, tell_table, write_json
from cllm4rec_dist.config import RunConfig, validate
from cllm4rec_dist.corpus.batches import BatchSource
from cllm4rec_dist.corpus.prompts import Document
from cllm4rec_dist.corpus.tokenizer import TokenSpace
from cllm4rec_dist.engine import start_world
from cllm4rec_dist.model.backbone import load_backbone, load_words
from cllm4rec_dist.step import train_step
from cllm4rec_dist.system import System, assemble, start_rows

ROOT = Path(__file__).parents[1]
PARTS = ("data", "lookup", "backbone", "head", "optimizer")


class Peer(nn.Module):
    """CLLM4Rec as one would write it with transformers, in one process."""

    def __init__(self, config: RunConfig, space: TokenSpace) -> None:
        super().__init__()
        folder = Path(config.backbone)
        self.config, self.space = config, space
        self.decoder = load_backbone(folder, config.adapter, torch.float32, config.seed)
        words = load_words(folder, torch.float32, torch.device("cpu"))
        self.words, self.word_head = words.embedding, words.head
        width, rows = self.words.shape[1], space.num_users + space.num_items
        self.collaborative, self.content = nn.Embedding(rows, width), nn.Embedding(rows, width)
        for table in (self.collaborative, self.content):
            nn.init.normal_(table.weight, std=0.02)
        self.optimizer = torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-4, fused=True)

    def _hidden(self, which: str, documents: list[Document]) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states of the predicting positions, their targets, and the user and item tokens."""
        longest = max(len(d.token_ids) for d in documents)
        tokens = torch.zeros(len(documents), longest, dtype=torch.long)
        for row, document in enumerate(documents):
            tokens[row, : len(document.token_ids)] = torch.from_numpy(document.token_ids)
        table = self.collaborative if which == "collaborative" else self.content
        is_row = tokens >= self.space.first_user
        words = F.embedding(tokens.where(~is_row, 0), self.words)
        rows = table(torch.where(is_row, tokens - self.space.first_user, 0))
        embedded = torch.where(is_row[..., None], rows, words)
        # Padding stands behind the document and attention is causal: no mask is needed, which is the faster way.
        inputs = (embedded, None) if which == "collaborative" else (None, embedded)
        hidden = next(found for found in self.decoder(*inputs) if found is not None)
        places = [(row, int(d.queries[q])) for row, d in enumerate(documents) for q in d.target_query]
        row, column = torch.tensor(places).T
        targets = torch.cat([torch.from_numpy(d.targets.astype("int64")) for d in documents])
        return hidden[row, column], targets, tokens[is_row]

    def step(self, users: list[Document], texts: list[Document]) -> None:
        """One optimizer step over the documents, in as many micro-batches as the run has."""
        parts = self.config.batch.accumulation
        num_items, num_words = sum(len(d.targets) for d in users), sum(len(d.targets) for d in texts)
        self.optimizer.zero_grad()
        for part in range(parts):
            hidden, targets, tokens = self._hidden("collaborative", users[part::parts])
            items = self.collaborative.weight[self.space.num_users :]
            loss = F.cross_entropy(hidden @ items.T, targets, reduction="sum") / num_items
            hidden, targets, more = self._hidden("content", texts[part::parts])
            loss = loss + F.cross_entropy(hidden @ self.word_head.T, targets, reduction="sum") / num_words
            touched = torch.unique(torch.cat([tokens, more])) - self.space.first_user
            own, content = self.collaborative(touched), self.content(touched)
            rows = self.config.rows
            mutual = rows.lambda_c / 2 * (content - own).square().sum() + rows.lambda_l / 2 * own.square().sum()
            (loss + mutual / len(touched) / parts).backward()
        nn.utils.clip_grad_norm_(self.parameters(), self.config.optimizer.clip_norm)
        self.optimizer.step()


class Clock:
    """Where a step's time goes: forward by calls, backward by the moments at which gradients arrive."""

    def __init__(self, system: System) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._system, self._engine = system, system.engine
        self._arrived: dict[str, float] = {}

    def step(self, source: BatchSource, number: int) -> int:
        """One step, timed; its real tokens."""
        engine, seconds = self._engine, self.seconds
        started = time.perf_counter()
        batch = source.make(number)
        seconds["data"] += time.perf_counter() - started
        forward, backward, step, optimizer = (
            type(engine).__call__, engine.backward, engine.step, self._system.table_optimizer.step,
        )  # fmt: skip
        marks: dict[str, float] = {}

        def timed_forward(this: Any, *inputs: Tensor | None) -> tuple[Tensor | None, ...]:
            begin = time.perf_counter()
            for value in inputs[:2]:
                if value is not None:
                    value.register_hook(lambda _: marks.__setitem__("embedded", time.perf_counter()))
            found = forward(this, *inputs)
            for value in found:
                if value is not None:
                    value.register_hook(lambda _: marks.__setitem__("hidden", time.perf_counter()))
            marks["end of forward"] = time.perf_counter()
            seconds["lookup"] += begin - marks["begin"]
            seconds["backbone"] += marks["end of forward"] - begin
            return found

        def timed_backward(loss: Tensor) -> bool:
            begin = time.perf_counter()
            done = backward(loss)
            end = time.perf_counter()
            seconds["head"] += begin - marks["end of forward"] + marks["hidden"] - begin
            seconds["backbone"] += marks["embedded"] - marks["hidden"]
            seconds["lookup"] += end - marks["embedded"]
            marks["begin"] = end
            return done

        def timed_step(rate: float) -> None:
            step(rate)
            seconds["optimizer"] += time.perf_counter() - marks["begin"]
            marks["begin"] = time.perf_counter()

        type(engine).__call__ = timed_forward  # type: ignore[method-assign]
        engine.backward, engine.step = timed_backward, timed_step  # type: ignore[method-assign]
        try:
            marks["begin"] = time.perf_counter()
            return train_step(self._system, batch.micro_batches, 1.0, math.inf).tokens
        finally:
            type(engine).__call__ = forward  # type: ignore[method-assign]
            engine.backward, engine.step = backward, step  # type: ignore[method-assign]
            self._system.table_optimizer.step = optimizer  # type: ignore[method-assign]


def measure(chosen: argparse.Namespace, stage: str) -> dict[str, Any]:
    """Real tokens a second of both, over the same steps in turns."""
    config = validate(RunConfig, {
        "stage": stage, "corpus": chosen.corpus, "backbone": chosen.backbone, "output": tempfile.gettempdir(),
        "deepspeed": str(ROOT / "ds_configs/zero3.json"), "adapter": {"rank": 8}, "rows": {"start": "prior"},
        "batch": {"users": chosen.users, "texts": chosen.texts, "accumulation": 2}, "method": {"max_history": 200},
    }, "benchmark")  # fmt: skip
    world = start_world()
    system = assemble(config, world)
    start_rows(system)
    source, clock = BatchSource(system.corpus, system.composer, config, world), Clock(system)
    peer = Peer(config, system.composer.space)
    ours, theirs, filled = [], [], []
    for number in range(chosen.warmup + chosen.steps):
        if number == chosen.warmup:
            clock.seconds = dict.fromkeys(PARTS, 0.0)
        system.train(True)
        started = time.perf_counter()
        tokens = clock.step(source, number)
        ours.append(tokens / (time.perf_counter() - started))
        started = time.perf_counter()
        users, texts = source.documents(number)
        peer.step(users, texts)
        theirs.append(tokens / (time.perf_counter() - started))
        padded = sum(
            len(part) * max(len(d.token_ids) for d in part)
            for found in (users, texts) for part in (found[0::2], found[1::2])
        )  # fmt: skip
        filled.append(tokens / padded)
    ours, theirs = ours[chosen.warmup :], theirs[chosen.warmup :]
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    total = sum(clock.seconds.values())
    return {
        "tokens_per_second": statistics.median(ours), "peer_tokens_per_second": statistics.median(theirs),
        "ratio": statistics.median(ratios), "ratio_range": [min(ratios), max(ratios)],
        "peer_filled": statistics.mean(filled),
        "shares": {part: value / total for part, value in clock.seconds.items()},
    }  # fmt: skip


def main() -> None:
    options = parser("step", __doc__)
    options.add_argument("--corpus", required=True)
    options.add_argument("--backbone", required=True)
    options.add_argument("--users", type=int, default=256)
    options.add_argument("--texts", type=int, default=64)
    options.add_argument("--steps", type=int, default=20)
    options.add_argument("--warmup", type=int, default=3)
    chosen = options.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    figures = {stage: measure(chosen, stage) for stage in ("pretrain", "finetune")}
    tell_table(
        ["stage", "real tokens/s", "Hugging Face alone", "ratio", "lowest", "highest", *PARTS],
        [[stage, f"{f['tokens_per_second']:,.0f}", f"{f['peer_tokens_per_second']:,.0f}", f"{f['ratio']:.1f}",
          *(f"{r:.1f}" for r in f["ratio_range"]), *(f"{f['shares'][p]:.0%}" for p in PARTS)]
         for stage, f in figures.items()],
    )  # fmt: skip
    tell(f"padded batches hold {figures['pretrain']['peer_filled']:.0%} real tokens")
    write_json(chosen.json, {"batch": {"users": chosen.users, "texts": chosen.texts}, **figures})


if __name__ == "__main__":
    main()
