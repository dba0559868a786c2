"""Write dense vectors of a corpus' item titles, as `embeddings.item_vectors` reads them, from any encoder or decoder.

    python -m benchmarks.item_vectors CORPUS MODEL OUT.parquet [--layer N] [--batch 64]

MODEL is a local folder of transformers. A title's vector is the mean hidden state of its tokens after layer N; the
middle layer if N is left out. Items without a title get none.
"""

from __future__ import annotations

import argparse
import time

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import AutoModel, AutoTokenizer

from benchmarks.common import show
from cllm4rec_dist.corpus.shards import Corpus


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus")
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument("--layer", type=int)
    parser.add_argument("--batch", type=int, default=64)
    options = parser.parse_args()

    items = Corpus.open(options.corpus, verify=False).items().select(["item", "title"]).to_pylist()
    items = sorted((item for item in items if item["title"]), key=lambda item: len(item["title"]))
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModel.from_pretrained(options.model, dtype=torch.float32).eval()
    layer = model.config.num_hidden_layers // 2 if options.layer is None else options.layer

    started, vectors = time.perf_counter(), []
    for start in range(0, len(items), options.batch):
        titles = [item["title"] for item in items[start : start + options.batch]]
        tokens = tokenizer(titles, padding=True, truncation=True, max_length=128, return_tensors="pt")
        hidden = model(**tokens, output_hidden_states=True).hidden_states[layer]
        mask = tokens["attention_mask"][..., None]
        vectors += ((hidden * mask).sum(1) / mask.sum(1)).tolist()
    table = pa.table({"item": [item["item"] for item in items], "vector": pa.array(vectors, pa.list_(pa.float32()))})
    pq.write_table(table, options.out)
    seconds = time.perf_counter() - started
    show(f"{len(items)} vectors of {len(vectors[0])} numbers after layer {layer} in {seconds:.0f} s: {options.out}")


if __name__ == "__main__":
    main()
