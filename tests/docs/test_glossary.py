"""Every name of the code in the glossary is one of the code's."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
CODE = re.compile(r"`([^`<>]+)`")
OTHERS = {"RaggedTensor", "JaggedTensor", "SparseAdam", "implicit", "input_dist", "output_dist", "manifest.json"}
"""Names of other libraries, and of files."""


def rows() -> list[list[str]]:
    lines = (ROOT / "docs/glossary.md").read_text(encoding="utf-8").splitlines()
    tables = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines if line.startswith("| ")]
    return [[cell.strip() for cell in row] for row in tables if row[0].strip() != "term"]


def test_each_term_has_one_sentence_and_comes_once() -> None:
    terms = [term for term, _, _ in rows()]
    assert len(terms) == len(set(terms))
    for term, meaning, _ in rows():
        assert meaning.endswith("."), term
        assert not re.search(r"\.\s+[A-Z]", meaning), f"{term}: more than one sentence"


def test_names_are_those_of_the_code() -> None:
    files = [*(ROOT / "cllm4rec_dist").rglob("*.py")]
    words = set(re.findall(r"\w+", " ".join(path.read_text(encoding="utf-8") for path in files)))
    for term, *cells in rows():
        for name in CODE.findall(" ".join([term, *cells])):
            parts = set(re.findall(r"[A-Za-z_]\w*", name))
            assert name in OTHERS or parts <= words, f"{term}: {name} is not in the code"
