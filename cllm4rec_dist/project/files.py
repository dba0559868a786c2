"""Render the commented files of a new project, and describe them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from cllm4rec_dist.config import MethodConfig
from cllm4rec_dist.filesystems import is_url
from cllm4rec_dist.project.column_stats import ColumnStats
from cllm4rec_dist.project.layout import Project
from cllm4rec_dist.project.machine import Machine
from cllm4rec_dist.project.points import decimal_mark
from cllm4rec_dist.project.sample import Sample
from cllm4rec_dist.suggestions import plural

if TYPE_CHECKING:
    from cllm4rec_dist.project.create import Proposal

SHARED_USER_RATIO = 0.2
"""Fraction of the training prompts with the shared user embedding, which serves users without one."""
_RELATIVE_EMBEDDINGS_LR = 0.01
"""Learning rate of embeddings relative to their initial scale, which is that of a pretrained backbone's words."""
_COMMENT_COLUMN = 44
_COMMENTS = {
    "user": "who",
    "item": "what",
    "timestamp": "when; only the order counts",
    "time_format": "3/4/2024 alone could be read in two ways",
    "rating": "how well it was liked",
    "decimal": "decimal mark of ratings",
    "text": "words of theirs",
    "title": "what an item is called",
    "category": "by which lists can be narrowed",
    "description": "more words about an item",
    "html": "tags are taken out of the texts",
    "separator": "between fields",
    "encoding": "the file is not UTF-8",
    "names": "the file has no header",
    "quoting": "what a quotation mark means",
    "escape": "takes its meaning from a mark",
}


def render(project: Project, proposal: Proposal, backbone: str | None) -> dict[Path, str]:
    """Return the text of each file."""
    texts = {
        project.recipe_file: _recipe(project, proposal),
        project.pretrain_file: _run(project, proposal, backbone, "pretrain"),
        project.finetune_file: _run(project, proposal, backbone, "finetune"),
    }
    return texts if backbone is not None else texts | {project.backbone_file: _backbone(project, proposal)}


def _scalar(value: Any) -> str:
    """Format a value as YAML on one line."""
    return (
        yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6, sort_keys=False)
        .removesuffix("...\n")
        .strip()
    )


def _line(indent: int, key: str, value: Any, comment: str | None = None) -> str:
    """Format a line with its comment after it, or above it if there is no room."""
    text = f"{' ' * indent}{key}: {_scalar(value)}"
    if comment is None:
        return text
    if len(text) <= _COMMENT_COLUMN:
        return f"{text:<{_COMMENT_COLUMN}} # {comment}"
    return f"{' ' * indent}# {comment[0].upper()}{comment[1:]}.\n{text}"


def _section(indent: int, title: str, values: dict[str, Any], comment: str) -> list[str]:
    lines = [f"{' ' * indent}{title}:  # {comment}"]
    return lines + [_line(indent + 2, key, value, _COMMENTS.get(key)) for key, value in values.items()]


def _recipe(project: Project, proposal: Proposal) -> str:
    recipe, source = proposal.recipe, proposal.recipe["source"]
    split = recipe["split"]
    lines = [
        f"# How the data of {recipe['name']} are read, as guessed by `cllm4rec init`. Correct what is wrong: every key",
        "# is explained by `cllm4rec settings recipe`, and docs/data.md explains how values are read.",
        _line(0, "name", recipe["name"]),
        "source:",
        "  format: table",
        *_section(2, "interactions", source["interactions"], "a row for each thing that somebody bought, saw, rated"),
    ]
    for name, comment in (("items", "a row for each item"), ("users", "a row for each customer")):
        if name in source:
            lines += _section(2, name, source[name], comment)
    if "rating_threshold" in recipe:
        lines.append(_line(0, "rating_threshold", recipe["rating_threshold"], "what is rated lower is left out"))
    held_out = "the last two of each customer" if split["kind"] == "last" else "a random fifth, for there are no times"
    lines += [
        _line(0, "min_user_items", recipe["min_user_items"], "customers with fewer items are left out"),
        _line(0, "min_item_users", recipe["min_item_users"], "items that fewer customers have are left out"),
        _line(0, "split", split, f"held out to choose and to judge the model: {held_out}"),
        "# split: {kind: none}   # for production: train on everything, as a validated run chose (docs/linear.md)",
        "",
    ]
    return "\n".join(lines)


def _backbone(project: Project, proposal: Proposal) -> str:
    sizes = proposal.sizes
    return "\n".join(
        [
            "# The language model: a small decoder with random weights, trained whole (`cllm4rec settings backbone`).",
            "# For a pretrained one start with `cllm4rec init ... --backbone FOLDER`.",
            _line(0, "hidden_size", sizes.hidden_size, "width; also that of users and items"),
            _line(0, "num_layers", sizes.num_layers),
            _line(0, "num_heads", sizes.num_heads),
            _line(0, "vocab_size", sizes.vocab_size, "words that texts are cut into"),
            _line(0, "dropout", 0.3),
            "",
        ]
    )


def _run(project: Project, proposal: Proposal, backbone: str | None, stage: str) -> str:
    sizes, folder = proposal.sizes, project.folder
    is_first = stage == "pretrain"
    lines = [
        f"# Stage {1 if is_first else 2} of {proposal.recipe['name']}: "
        + ("users, items and texts learn each other's language." if is_first else "learn to recommend, from stage 1."),
        "# `cllm4rec settings` explains every key. `cllm4rec run` sets the four paths to those of its project.",
        _line(0, "corpus", str(folder / "corpus")),
        _line(0, "backbone", str(folder / "backbone") if backbone is None else backbone),
        _line(0, "output", str(folder / "runs" / stage)),
    ]
    if not is_first:
        lines.append(_line(0, "init_from", str(folder / "runs" / "pretrain")))
    if sizes.precision != "fp32":
        lines.append(_line(0, "precision", sizes.precision))
    adapter: dict[str, Any] = {"kind": "full"} if backbone is None else {"kind": "lora", "rank": 16}
    why = "random weights: nothing to keep frozen" if backbone is None else "the pretrained weights stay as they are"
    head: dict[str, Any] = {"similarity": "cosine", "pool_residual": True}
    from_items = None
    if backbone is not None:
        head["projection"], from_items = True, "scores start from the items alone and learn what the backbone adds"
    dropout = "heavy dropout: titles pay, little is learnt by heart"
    batch = {
        "users": sizes.users,
        "texts": sizes.texts,
        "gradient_accumulation_steps": sizes.gradient_accumulation_steps,
    }
    optimizer = _optimizer(proposal, is_first=is_first)
    lines += [
        _line(0, "adapter", adapter, why),
        _line(0, "embeddings", {"init": "spectral", "dropout": sizes.dropout}, dropout),
        _line(0, "head", head, from_items),
        _line(0, "method", _method(sizes.max_history, is_first=is_first)),
        _line(0, "batch", batch, "over all ranks, at each step"),
        _line(0, "optimizer", optimizer, "embeddings learn slowly, or they learn by heart"),
    ]
    if not is_first:
        validation = {
            "metrics": ["recall@20", "recall@40", "ndcg@100"],
            "early_stopping_patience": sizes.patience,
            "batch_users": min(256, max(64, sizes.users)),
        }
        lines.append(_line(0, "validation", validation, "the first metric chooses the best epoch"))
    lines += [_line(0, "epochs", sizes.pretrain_epochs if is_first else sizes.finetune_epochs), ""]
    return "\n".join(lines)


def _method(max_history: int, *, is_first: bool) -> dict[str, Any]:
    method: dict[str, Any] = {"max_history": max_history}
    if not is_first:
        method["target"] = "all"
    if "shared_user_ratio" in MethodConfig.model_fields:
        method["shared_user_ratio"] = SHARED_USER_RATIO
    return method


def _optimizer(proposal: Proposal, *, is_first: bool) -> dict[str, Any]:
    # docs/quality.md and docs/shared-words.md have what other rates do.
    warmup_steps = proposal.sizes.warmup_steps
    if proposal.embedding_scale is not None:
        embeddings_lr = float(f"{_RELATIVE_EMBEDDINGS_LR * proposal.embedding_scale:.1e}")
        return {"lr": 5e-4, "embeddings_lr": embeddings_lr, "warmup_steps": warmup_steps}
    if is_first:
        return {"lr": 1e-3, "embeddings_lr": 1e-4, "warmup_steps": warmup_steps}
    if proposal.sizes.shares_words:
        return {"lr": 1e-3, "embeddings_lr": 1.5e-4, "words_lr_ratio": 2.0, "warmup_steps": warmup_steps}
    return {"lr": 1e-3, "embeddings_lr": 3e-4, "warmup_steps": warmup_steps}


def describe(project: Project, proposal: Proposal, machine: Machine, backbone: str | None) -> str:
    """Describe the guessed columns, the chosen sizes and the next command."""
    lines = [line for role in proposal.samples for line in _columns(proposal, proposal.samples[role], role)]
    data, sizes, core = proposal.data, proposal.sizes, proposal.core
    scope = " in the first rows" if data.is_estimate else ""
    lines += [
        "",
        f"data      {data.users:,} customers, {data.items:,} items, {data.interactions:,} pairs{scope}",
    ]
    lines += [f"          left out: {count:,} x {reason}" for reason, count in proposal.left_out.items()]
    if proposal.interactions.time is None:
        lines.append("          no column of times: held-out items are drawn at random, not the last ones")
    num_rare = int((data.item_counts < core.min_item_users).sum())
    rare = f"; {plural(num_rare, 'item')} with fewer will not be recommended" if num_rare else ""
    fewest = f"customers with {core.min_user_items}, items with {core.min_item_users} or more"
    lines.append(f"          kept: {fewest}{rare}")
    lines.append(f"machine   {machine}")
    model = f"a decoder of {sizes.num_layers} x {sizes.hidden_size}, {sizes.vocab_size:,} words, trained whole"
    lines.append(f"model     {model if backbone is None else f'{backbone} with LoRA'}")
    lines.append(
        f"training  {sizes.users} customers and {sizes.texts} texts a step; {sizes.pretrain_epochs} epochs of"
        f" pretraining, at most {sizes.finetune_epochs} of finetuning"
    )
    workers = f" --workers {len(machine.gpu_memory)}" if len(machine.gpu_memory) > 1 else ""
    names = ", ".join(sorted(path.name for path in render(project, proposal, backbone)))
    lines += [
        "",
        f"written   {names} in {project.folder}",
        "          Look at recipe.yaml: a wrong column makes a wrong model.",
        f"next      cllm4rec run {project.folder}{workers}",
    ]
    return "\n".join(lines)


def _columns(proposal: Proposal, sample: Sample, role: str) -> list[str]:
    """Return a line for each column in use, with an example value."""
    kinds = {"csv": "CSV", "jsonl": "JSON", "parquet": "Parquet"}
    more = f" ({kinds[sample.kind]}"
    if sample.kind == "csv":
        more += f", separated by {sample.dialect.separator!r}, {sample.dialect.encoding}"
    lines = [f"{role:<9} {_shown(sample.path)}{more})"]
    source = proposal.recipe["source"]
    tables = {"orders": ["interactions"], "items": ["items"], "customers": ["users"]}[role]
    if role == "orders" and "items" not in proposal.samples and "items" in source:
        tables.append("items")
    used: list[str] = []
    used_roles = source["interactions"].keys()
    for table in tables:
        for key, value in source.get(table, {}).items():
            names = [value] if isinstance(value, str) else value
            if key in ("user", "item", "timestamp", "rating", "text", "title", "category", "description"):
                for name in names:
                    lines.append(f"  {key:<12}{name:<20} {_example(sample, name)}{_note(source[table], key)}")
                    used.append(name)
    unused = [name for name in sample.names if name not in used]
    if unused:
        lines.append(f"  {'not used':<12}{', '.join(unused)}")
    if role == "orders":
        lines += [line for name in unused for line in _returns(sample, name, has_rating="rating" in used_roles)]
        if "timestamp" not in used_roles:
            lines += [line for name in unused for line in _unread_times(sample, name)]
    return lines


def _unread_times(sample: Sample, name: str) -> list[str]:
    """Return lines about an unused column that is named like a time and has digits, but cannot be read as one."""
    stats = ColumnStats(name, sample.columns[name])
    is_like_time = "time" in stats.kinds and "other_time" not in stats.kinds and stats.times is None
    if not is_like_time or not stats.texts.str.contains(r"\d").any():
        return []
    return [
        f"  {'times?':<12}{name} cannot be read, such as {_example(sample, name)}. If it is the time of a purchase,",
        f"  {'':<12}remove the folder and repeat with its form: --time-column {name} --time-format '%d.%m.%Y %H:%M'",
    ]


def _returns(sample: Sample, name: str, *, has_rating: bool) -> list[str]:
    """Return lines about the negative quantities of an unused column; none if it has none."""
    stats = ColumnStats(name, sample.columns[name])
    if "quantity" not in stats.kinds:
        return []
    mark = decimal_mark(stats)
    num_negative = int((stats.numbers(mark) < 0).sum())
    if not num_negative:
        return []
    rows = f"{len(sample.columns):,}{'' if sample.is_whole else ' first'} rows"
    lines = [f"{name} is negative in {num_negative:,} of the {rows}, which count as purchases like all others."]
    if has_rating:
        lines.append("If they are returns, remove them from the file.")
    else:
        decimal = "" if mark == "." else f" and `decimal: '{mark}'`"
        lines += [
            f"If they are returns, remove them from the file, or set `rating: {name}`{decimal} of interactions and",
            "`rating_threshold: 0.001` of the recipe, which leaves them out.",
        ]
    return [f"  {'' if index else 'returns?':<12}{line}" for index, line in enumerate(lines)]


def _shown(path: str) -> str:
    """Shorten a path: relative to the working directory if it is below it."""
    relative = path if is_url(path) else os.path.relpath(path)
    return path if relative.startswith("..") else relative


def _example(sample: Sample, name: str) -> str:
    values = sample.columns[name].drop_nulls()
    text = " ".join(str(values[0]).split()) if len(values) else ""
    return repr(text if len(text) <= 40 else f"{text[:37]}...")


def _note(table: dict[str, Any], key: str) -> str:
    if key == "timestamp" and "time_format" in table:
        return f", read as {table['time_format']}"
    return f", decimal mark {table['decimal']}" if key == "rating" and "decimal" in table else ""
