"""Fast checks of a run, which report all problems at once.

A command calls them before it imports torch, DeepSpeed or Ray, which takes many seconds; `train` calls them again on
every rank, for callers without a command line. They use only the configuration, the corpus' manifest and the local
file system. `system.py` and `train.py` check what needs a loaded backbone or an opened checkpoint.
"""

from cllm4rec_dist.preflight.paths import backbone_problems, folder_problems, tokenizer_problems
from cllm4rec_dist.preflight.run import (
    corpus_problems,
    item_vectors_problems,
    metric_problems,
    num_steps,
    past_end_problems,
    require_held_out,
    require_none,
    require_ready,
    resolve_paths,
    resolve_resume,
    setting_problems,
    source_problems,
    total_steps,
    tracker_problems,
    warmup_warning,
)
from cllm4rec_dist.preflight.widths import stage_width_problems, width_problems

__all__ = [
    "backbone_problems",
    "corpus_problems",
    "folder_problems",
    "item_vectors_problems",
    "metric_problems",
    "num_steps",
    "past_end_problems",
    "require_held_out",
    "require_none",
    "require_ready",
    "resolve_paths",
    "resolve_resume",
    "setting_problems",
    "source_problems",
    "stage_width_problems",
    "tokenizer_problems",
    "total_steps",
    "tracker_problems",
    "warmup_warning",
    "width_problems",
]
