"""The notebook of the Python API runs on another run than the one whose outputs it keeps."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[2] / "docs/notebooks/recommend.ipynb"


@pytest.mark.integration
def test_the_notebook_runs(runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLLM4REC_RUN", str(runs["cosine"]))
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOK.parents[2]))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [str(cell.get("outputs")) for cell in notebook.cells if cell.cell_type == "code"]
    assert "23 users, 17 items" in shown[0]
    assert "Did you mean user-000?" in shown[-1]


def test_its_outputs_are_kept_and_name_no_machine() -> None:
    content = NOTEBOOK.read_text(encoding="utf-8")
    cells = [cell for cell in nbformat.reads(content, as_version=4).cells if cell.cell_type == "code"]
    assert all(cell.outputs for cell in cells)
    assert not any(output.output_type == "error" for cell in cells for output in cell.outputs)
    assert not any(path in content for path in ("/tmp", "/home", "/root", "/work"))
