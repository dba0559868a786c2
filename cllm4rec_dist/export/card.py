"""The model card of a folder to publish: README.md with the hub's front matter, rendered from `templates/`.

It describes data, method, results compared with the baselines, training, limits and licence, and has a Python snippet
that computes scores from the folder alone. It contains no path, user or raw value: for data left out it gives only
reasons and counts, and only the settings that affect the result.
"""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined

from cllm4rec_dist.checkpointing.run_folder import EVALUATION_FILE
from cllm4rec_dist.config import dotted_items
from cllm4rec_dist.corpus.manifest import Manifest
from cllm4rec_dist.errors import CLLM4RecError
from cllm4rec_dist.evaluation.results import Results, markdown_table
from cllm4rec_dist.export.options import ExportOptions
from cllm4rec_dist.export.scoring import BACKBONE_FOLDER
from cllm4rec_dist.export.source import SHARED_USER, Source
from cllm4rec_dist.model.backbone import COLLABORATIVE, CONTENT

logger = logging.getLogger(__name__)

_SETTINGS = (
    "stage",
    "seed",
    "precision",
    "quantization",
    "epochs",
    "max_steps",
    "adapter",
    "embeddings",
    "head",
    "method",
    "linear",
    "batch",
    "optimizer",
)
"""Settings that affect the result; the others are paths, or concern logging and checkpoints."""
_LIBRARIES = {"lora": "peft", "full": "transformers", "none": "transformers"}
_TAGS = ["recommendation", "recommender-system", "collaborative-filtering", "cllm4rec"]
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def write_card(source: Source, options: ExportOptions, scoring: dict[str, Any], path: Path) -> None:
    """Write the model card of a folder to publish.

    Args:
        scoring: contents of the folder's scoring.json.
        path: README.md in the folder; all other files must exist already.
    """
    assert source.corpus is not None, "open_source(needs_corpus=True)"
    manifest = source.corpus.manifest
    results, split = _read_evaluation(source)
    title = f"CLLM4Rec on {manifest.name}"
    template = _environment().get_template("model_card.md.jinja")
    content = template.render(
        metadata=_metadata(source, options, title, manifest, results, split),
        title=title,
        repository=options.push or "ORG/NAME",
        manifest=manifest,
        files=_files(path.parent),
        with_users=options.includes_users,
        has_index=options.faiss,
        packages=" ".join(_packages(scoring)),
        code=score_lines(scoring, options),
        scoring=scoring,
        without_row=_without_row(source),
        kept=_kept(manifest),
        split=_split(manifest),
        base_model=source.base_model,
        has_content=CONTENT in source.llms,
        num_user_texts=_num_user_texts(manifest) if CONTENT in source.llms else 0,
        results=results,
        # Without the notes of the results, which name the runs that this one started from.
        table="" if results is None else markdown_table(results.model_copy(update={"notes": ()})),
        notes=_notes(source),
        best=_best(source),
        settings=_settings(source),
        license=options.license,
    )
    path.write_text(content, encoding="utf-8")


def score_lines(scoring: dict[str, Any], options: ExportOptions) -> str:
    """Return the Python snippet that computes the scores of all items from an exported folder.

    Args:
        scoring: contents of the folder's scoring.json.
    """
    kind = scoring["adapter"]["kind"]
    template = _environment().get_template("scores.py.jinja")
    return template.render(
        scoring=scoring,
        backbone=BACKBONE_FOLDER if kind == "full" else scoring["backbone"],
        user_row=_user_row(options),
    )


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("cllm4rec_dist.export"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["md"] = escape_markdown
    return environment


def escape_markdown(text: object) -> str:
    """Escape a text for Markdown, including tables, and put it on one line."""
    return re.sub(r"([\\`*_\[\]<>|#~$])", r"\\\1", " ".join(str(text).split()))


def _metadata(
    source: Source, options: ExportOptions, title: str, manifest: Manifest, results: Results | None, split: str
) -> str:
    """The YAML front matter, with its delimiters."""
    measured = {} if results is None else results.rows[0].metrics
    dataset = re.sub(r"[^\w.-]+", "-", manifest.name).strip("-.") or "dataset"
    evaluations = [
        EvalResult(
            task_type="other",
            task_name="Recommendation",
            dataset_type=dataset,
            dataset_name=manifest.name,
            dataset_split=split,
            metric_type=metric,
            metric_value=round(value, 4),
        )
        for metric, value in measured.items()
    ]
    data = ModelCardData(
        license=options.license,
        base_model=source.base_model,
        library_name=_LIBRARIES[source.config.adapter.kind],
        pipeline_tag="other",
        tags=_TAGS,
        datasets=[manifest.name] if _REPOSITORY.fullmatch(manifest.name) else None,
        metrics=list(measured) or None,
        model_name=title,
        eval_results=evaluations or None,
    )
    return f"---\n{data.to_yaml()}\n---"


def _read_evaluation(source: Source) -> tuple[Results | None, str]:
    """Read the results of this checkpoint and the split they were computed on; None if it was not evaluated."""
    others: list[str] = []
    for run in dict.fromkeys((Path(source.run).absolute(), Path(source.opened.path).absolute().parent.parent)):
        folder = run / "evaluation"
        try:
            evaluated = json.loads((folder / EVALUATION_FILE).read_text(encoding="utf-8"))
            results = Results.model_validate_json((folder / "results.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        except (OSError, ValueError, CLLM4RecError) as error:
            logger.warning("the card has no results: %s", error)
            continue
        if _matches(evaluated, source):
            return results, str(evaluated["split"])
        others.append(str(folder))
    reason = (
        f"{', '.join(others)} evaluates another checkpoint or other settings" if others else "there is no evaluation"
    )
    logger.warning("the card has no results: %s; run `cllm4rec evaluate %s` first", reason, source.run)
    return None, ""


def _matches(evaluated: dict[str, Any], source: Source) -> bool:
    """True if an evaluation belongs to the exported checkpoint, even if either has been moved."""
    about = source.opened.metadata
    return (
        Path(str(evaluated.get("checkpoint"))).name == source.opened.name
        and evaluated.get("fingerprints") == about.fingerprints
        and _have_same_settings(evaluated.get("config", {}), source.config.model_dump(mode="json"))
    )


def _have_same_settings(measured: dict[str, Any], exported: dict[str, Any]) -> bool:
    """True if the settings that both the evaluation and the export name are the same, except for the width.

    An evaluation names the width even if the run left it open.
    """
    one, other = (dict(dotted_items({key: config.get(key) for key in _SETTINGS})) for config in (measured, exported))
    return all(other[key] == value for key, value in one.items() if key in other and key != "embeddings.dim")


def _files(folder: Path) -> dict[str, str]:
    """Description of each file that the folder contains."""
    descriptions = {
        "backbone": "the backbone",
        COLLABORATIVE: "PEFT adapter of the collaborative LLM, for `AutoModel` and `AutoModelForCausalLM`",
        f"{COLLABORATIVE}-causal-lm": "the same with task type CAUSAL_LM",
        CONTENT: "PEFT adapter of the content LLM",
        f"{CONTENT}-causal-lm": "the same with task type CAUSAL_LM",
        "tables.safetensors": "embeddings, item head and linear memory",
        "items.parquet": "item ids in row order",
        "item_embeddings.parquet": "item, title, `vector` (the trained embedding), `score_vector` (its inner product"
        " with a query is the LLM's score)",
        "items.faiss": "exact FAISS index of the score vectors, by inner product",
        "users.parquet": "user ids in row order",
        "user_embeddings.parquet": "user, `vector`",
        "scoring.json": "how scores are computed",
    }
    return {name: content for name, content in descriptions.items() if (folder / name).exists()}


def _packages(scoring: dict[str, Any]) -> list[str]:
    packages = ["transformers", "safetensors", "numpy"]
    if scoring["adapter"]["kind"] == "lora":
        packages.append("peft")
    return [*packages, *(["bitsandbytes"] if scoring["quantization"] == "nf4" else [])]


def _user_row(options: ExportOptions) -> str:
    return (
        f'tables["{COLLABORATIVE}.users"][[0]]'
        if options.includes_users
        else f'tables["{COLLABORATIVE}.{SHARED_USER}"]'
    )


def _without_row(source: Source) -> str:
    if source.opened.metadata.has_shared_user:
        return "`collaborative.shared_user` was trained as the row of people who have none."
    return "`collaborative.shared_user` is zero: no row was trained for people who have none."


def _num_user_texts(manifest: Manifest) -> int:
    return sum(manifest.num_content.get(kind, 0) for kind in ("user_item", "user_profile"))


def _kept(manifest: Manifest) -> str:
    rules = manifest.preparation
    kept = [
        f"ratings of at least {rules.rating_threshold:g}" if rules.rating_threshold is not None else "",
        f"users with at least {rules.min_user_items} items" if rules.min_user_items > 1 else "",
        f"items with at least {rules.min_item_users} users" if rules.min_item_users > 1 else "",
    ]
    return ", ".join(part for part in kept if part) or "every interaction"


def _split(manifest: Manifest) -> str:
    rules = manifest.preparation.split.model_dump()
    kind = rules.pop("kind")
    details = [f"{key.replace('_', ' ')} {value}" for key, value in rules.items() if value is not None]
    return f"{kind} ({', '.join(details)}; seed {manifest.preparation.seed})" if details else str(kind)


def _notes(source: Source) -> list[str]:
    """Caveats about the results, without names of runs."""
    lineage, notes = source.opened.metadata.lineage, []
    if lineage is not None and lineage.leak is not None:
        notes.append(f"trained on {lineage.leak.count} held-out interactions: the results are not comparable")
    if lineage is not None and lineage.unknown:
        notes.append("it started from a run whose training data is not recorded: perhaps held-out interactions")
    return notes


def _best(source: Source) -> str:
    state = source.opened.metadata.run
    if state.best is None or state.best_step != state.step:
        return ""
    return f"{state.best_metric or 'validation result'} {state.best:.4f}"


def _settings(source: Source) -> str:
    tree = source.config.model_dump(mode="json")
    return yaml.safe_dump({key: tree[key] for key in _SETTINGS}, sort_keys=False)
