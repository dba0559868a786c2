"""A whole training step, compared with the same method written with Hugging Face libraries alone.

    python -m benchmarks.step --corpus shards/amazon-beauty --backbone backbones/amazon-beauty

The peer is what one would write for one machine: the decoder from transformers, two PEFT adapters, batches padded to
their longest document, `nn.Embedding` tables and dense heads over the predicted positions, torch's cross-entropy and
fused AdamW. It is timed with documents in the order of the stream (`padded`) and with documents of similar length in a
micro-batch (`grouped`), which needs less padding. All forms read the same documents and use all cores. Steps take
turns, so that other load on the machine affects all forms. Padding is not counted as tokens.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import Tensor, nn
from transformers import AutoModel

from benchmarks.common import parser, run_config, show_table, write_json
from cllm4rec_dist.config import RunConfig
from cllm4rec_dist.corpus.loader import BatchLoader
from cllm4rec_dist.corpus.tokenizer import TokenSpace
from cllm4rec_dist.distributed.engine import start_world
from cllm4rec_dist.model.backbone import load_frozen_embeddings, lora_settings
from cllm4rec_dist.step import train_step
from cllm4rec_dist.system import System, assemble, init_embeddings
from tests.documents import Document, documents_of_step

PARTS = ("data", "lookup", "backbone", "head", "optimizer")


class Peer(nn.Module):
    """CLLM4Rec in one process, written with transformers and PEFT."""

    def __init__(self, config: RunConfig, space: TokenSpace) -> None:
        super().__init__()
        folder = Path(config.backbone)
        self.config, self.space = config, space
        decoder = AutoModel.from_pretrained(folder, dtype=torch.float32)
        settings = lora_settings(config.adapter, decoder)
        self.decoder = get_peft_model(decoder, settings, "collaborative")
        self.decoder.add_adapter("content", settings)
        trained = [p for name, p in self.decoder.named_parameters() if "lora_" in name]
        words = load_frozen_embeddings(folder, torch.float32, torch.device("cpu"))
        self.words, self.word_head = words.embedding, words.head
        width, rows = self.words.shape[1], space.num_users + space.num_items
        self.collaborative, self.content = nn.Embedding(rows, width), nn.Embedding(rows, width)
        for table in (self.collaborative, self.content):
            nn.init.normal_(table.weight, std=0.02)
        self.trained = [*trained, self.collaborative.weight, self.content.weight]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4, fused=True)

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
        # Right padding and causal attention need no mask, which is faster.
        self.decoder.set_adapter(which)
        hidden = self.decoder(inputs_embeds=embedded, use_cache=False).last_hidden_state
        positions = [(row, int(d.queries[q])) for row, d in enumerate(documents) for q in d.target_query]
        row, column = torch.tensor(positions).T
        targets = torch.cat([torch.from_numpy(d.targets.astype("int64")) for d in documents])
        return hidden[row, column], targets, tokens[is_row]

    def step(self, micro_batches: list[tuple[list[Document], list[Document]]]) -> None:
        """Take one optimizer step."""
        num_items = sum(len(d.targets) for users, _ in micro_batches for d in users)
        num_words = sum(len(d.targets) for _, texts in micro_batches for d in texts)
        self.optimizer.zero_grad()
        for users, texts in micro_batches:
            hidden, targets, tokens = self._hidden("collaborative", users)
            items = self.collaborative.weight[self.space.num_users :]
            (F.cross_entropy(hidden @ items.T, targets, reduction="sum") / num_items).backward()
            hidden, targets, more = self._hidden("content", texts)
            loss = F.cross_entropy(hidden @ self.word_head.T, targets, reduction="sum") / num_words
            touched = torch.unique(torch.cat([tokens, more])) - self.space.first_user
            collaborative, content = self.collaborative(touched), self.content(touched)
            embeddings = self.config.embeddings
            mutual = (
                embeddings.lambda_c / 2 * (content - collaborative).square().sum()
                + embeddings.lambda_l / 2 * collaborative.square().sum()
            )
            (loss + mutual / len(touched) / len(micro_batches)).backward()
        nn.utils.clip_grad_norm_(self.trained, self.config.optimizer.max_grad_norm)
        self.optimizer.step()


def as_they_come(users: list[Document], texts: list[Document], parts: int) -> list[tuple[list[Document], ...]]:
    """Split into micro-batches of equally many documents, in any order."""
    return [(users[part::parts], texts[part::parts]) for part in range(parts)]


def by_length(users: list[Document], texts: list[Document], parts: int) -> list[tuple[list[Document], ...]]:
    """Split into micro-batches of equally many documents, longest documents first."""
    ranked = [sorted(documents, key=lambda d: -len(d.token_ids)) for documents in (users, texts)]
    return [
        tuple(ds[len(ds) * part // parts : len(ds) * (part + 1) // parts] for ds in ranked) for part in range(parts)
    ]


PEERS = {"padded": as_they_come, "grouped": by_length}


def packing_efficiency(micro_batches: list[tuple[list[Document], ...]]) -> float:
    """Fraction of positions that are not padding."""
    groups = [[len(d.token_ids) for d in documents] for part in micro_batches for documents in part]
    return sum(map(sum, groups)) / sum(len(group) * max(group) for group in groups)


class Clock:
    """Measures the parts of a step: forward by its calls, backward by the times at which gradients arrive."""

    def __init__(self, system: System) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._system, self._engine = system, system.engine

    def step(self, source: BatchLoader, step_index: int) -> int:
        """Take and time one step; return its step_index of tokens."""
        engine, seconds = self._engine, self.seconds
        started = time.perf_counter()
        batch = source.make(step_index)
        seconds["data"] += time.perf_counter() - started
        forward, backward, step, optimizer = (
            type(engine).__call__,
            engine.backward,
            engine.step,
            self._system.embedding_optimizer.step,
        )
        marks: dict[str, float] = {}

        def timed_forward(this: Any, embedded: Tensor, *more: Any) -> Tensor:
            begin = time.perf_counter()
            embedded.register_hook(lambda _: marks.__setitem__("embedded", time.perf_counter()))
            hidden = forward(this, embedded, *more)
            hidden.register_hook(lambda _: marks.__setitem__("hidden", time.perf_counter()))
            marks["end of forward"] = time.perf_counter()
            seconds["lookup"] += begin - marks["begin"]
            seconds["backbone"] += marks["end of forward"] - begin
            return hidden

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
            self._system.embedding_optimizer.step = optimizer  # type: ignore[method-assign]


def measure(chosen: argparse.Namespace, stage: str, users: int, texts: int) -> dict[str, Any]:
    """Tokens per second of all forms, over the same steps in turns."""
    config = run_config(chosen, stage, users=users, texts=texts, gradient_accumulation_steps=2)
    system = assemble(config, start_world())
    init_embeddings(system)
    source, clock = BatchLoader(system.corpus, system.prompts, config, system.world), Clock(system)
    peer = Peer(config, system.prompts.space)
    speeds: dict[str, list[float]] = {name: [] for name in ("ours", *PEERS)}
    filled: dict[str, list[float]] = {name: [] for name in PEERS}
    for step_index in range(chosen.warmup + chosen.steps):
        if step_index == chosen.warmup:
            clock.seconds = dict.fromkeys(PARTS, 0.0)
        system.train(True)
        started = time.perf_counter()
        tokens = clock.step(source, step_index)
        speeds["ours"].append(tokens / (time.perf_counter() - started))
        documents = documents_of_step(source, step_index)
        for name, grouped in PEERS.items():
            micro_batches = grouped(*documents, config.batch.gradient_accumulation_steps)
            started = time.perf_counter()
            peer.step(micro_batches)
            speeds[name].append(tokens / (time.perf_counter() - started))
            filled[name].append(packing_efficiency(micro_batches))
    speeds = {name: values[chosen.warmup :] for name, values in speeds.items()}
    ratios = {name: [a / b for a, b in zip(speeds["ours"], speeds[name], strict=True)] for name in PEERS}
    total = sum(clock.seconds.values())
    return {
        "stage": stage,
        "users": users,
        "texts": texts,
        "tokens_per_second": {name: statistics.median(values) for name, values in speeds.items()},
        "ratio": {name: statistics.median(values) for name, values in ratios.items()},
        "ratio_range": {name: [min(values), max(values)] for name, values in ratios.items()},
        "peers_filled": {name: statistics.mean(values) for name, values in filled.items()},
        "shares": {part: value / total for part, value in clock.seconds.items()},
    }


def main() -> None:
    options = parser("step", __doc__)
    options.add_argument("--corpus", required=True)
    options.add_argument("--backbone", required=True)
    options.add_argument("--batches", nargs="+", default=["256x64", "1024x256"], help="users x texts of a step")
    options.add_argument("--steps", type=int, default=9)
    options.add_argument("--warmup", type=int, default=2)
    chosen = options.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    rows, figures = [], []
    for batch in chosen.batches:
        users, texts = map(int, batch.split("x"))
        for stage in ("pretrain", "finetune"):
            result = measure(chosen, stage, users, texts)
            figures.append(result)
            row = [f"{stage} {batch}", f"{result['tokens_per_second']['ours']:,.0f}"]
            for name in PEERS:
                low, high = result["ratio_range"][name]
                row += [f"{result['peers_filled'][name]:.0%}", f"{result['ratio'][name]:.1f} ({low:.1f} to {high:.1f})"]
            rows.append([*row, *(f"{result['shares'][part]:.0%}" for part in PARTS)])
    names = [column for name in PEERS for column in (f"{name}: filled", "ratio")]
    show_table(["step", "real tokens/s", *names, *PARTS], rows)
    write_json(chosen.json, {"steps": figures})


if __name__ == "__main__":
    main()
