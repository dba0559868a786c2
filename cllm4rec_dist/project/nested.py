"""Nested fields of JSON and Parquet, which a recipe cannot use as columns, and commands to flatten them."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import polars as pl

from cllm4rec_dist.corpus.sources.encoding import first_text
from cllm4rec_dist.corpus.values import unwrap

Nesting = Literal["object", "list"]
"""Nesting of a field: one object, or a list of objects."""
_NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)


def nested_fields(rows: Iterable[Mapping[str, Any]]) -> dict[str, Nesting]:
    """Return the nested fields of JSON objects, in order of first appearance."""
    nested: dict[str, Nesting] = {}
    for row in rows:
        for name, value in row.items():
            plain = unwrap(value)
            if isinstance(plain, dict):
                nested.setdefault(name, "object")
            elif isinstance(plain, list) and any(isinstance(each, dict) for each in plain):
                nested[name] = "list"
    return nested


def nested_columns(columns: pl.DataFrame) -> dict[str, Nesting]:
    """Return the columns of Parquet that hold structs."""
    nested: dict[str, Nesting] = {}
    for name, dtype in columns.schema.items():
        if isinstance(dtype, pl.Struct):
            nested[name] = "object"
        elif isinstance(dtype, pl.List) and isinstance(dtype.inner, pl.Struct):
            nested[name] = "list"
    return nested


def rows_path(document: Any) -> str | None:
    """Return the `jq` path of the only list of several objects within objects, such as `.data.orders`, or None."""
    if not isinstance(document, dict):
        return None
    paths = []
    for name, value in document.items():
        if isinstance(value, list) and len(value) > 1 and all(isinstance(each, dict) for each in value):
            paths.append(_field(name))
        elif (inner := rows_path(value)) is not None:
            paths.append(_field(name) + (inner[1:] if inner.startswith(".[") else inner))
    return paths[0] if len(paths) == 1 else None


def jq(path: str, program: str) -> str:
    """Return the line of shell that writes the results of a `jq` program to `flat.json`."""
    source = shlex.quote(path)
    command = f"zcat {source} | jq -c" if path.endswith(".gz") else "jq -c"
    end = "" if path.endswith(".gz") else f" {source}"
    return f"{command} {shlex.quote(program)}{end} > flat.json"


def _field(name: str) -> str:
    return f".{name}" if _NAME.fullmatch(name) else f".[{json.dumps(name)}]"


def flattening(path: str, kind: str, nested: Mapping[str, Nesting]) -> str:
    """Return the end of an error's cure: a line of shell or Python that flattens the file."""
    fields = ", ".join(repr(name) for name in nested)
    what = f"its field {fields} holds" if len(nested) == 1 else f"its fields {fields} hold"
    line = _polars_line(path, nested) if kind == "parquet" else _jq_line(path, nested)
    return f"Flatten the file first, for {what} objects, of which no column can be named: {line}"


def _jq_line(path: str, nested: Mapping[str, Nesting]) -> str:
    steps = [".[]"] if first_text(path).lstrip().startswith("[") else []
    for name, nesting in nested.items():
        field = _field(name)
        inner = f"with_entries(.key |= {json.dumps(name + '_')} + .)"
        if nesting == "list":
            steps.append(f"{field}[]? as $x | del({field}) + ($x | {inner})")
        else:
            steps.append(f". + ({field} // {{}} | {inner}) | del({field})")
    return jq(path, " | ".join(steps))


def _polars_line(path: str, nested: Mapping[str, Nesting]) -> str:
    exploded = "".join(f".explode({name!r})" for name, nesting in nested.items() if nesting == "list")
    structs = "".join(
        f".with_columns(pl.col({name!r}).name.prefix_fields({name + '_'!r})).unnest({name!r})" for name in nested
    )
    return f"pl.read_parquet({path!r}){exploded}{structs}.write_parquet('flat.parquet') (import polars as pl)"
