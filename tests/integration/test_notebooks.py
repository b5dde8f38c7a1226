"""Every notebook runs as it is, and what it shows is stored in it.

`make notebooks` stores anew, by this test.
"""

import os
import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.long
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(path, tmp_path):
    shutil.copytree(ROOT / "notebooks" / "data", tmp_path / "notebooks" / "data")
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    notebook = nbformat.read(path, as_version=4)
    stored = [outputs(cell) for cell in notebook.cells]
    place = {"metadata": {"path": tmp_path / "notebooks"}}
    client = NotebookClient(
        notebook, timeout=170, resources=place, record_timing=False, coalesce_streams=True
    )
    client.execute()
    shown = [outputs(cell) for cell in notebook.cells]
    assert any(shown)
    # Under pytest, ipykernel does not catch what TensorFlow's libraries write when they start.
    assert not noise(notebook)
    if os.environ.get("TF_DROPMAX_STORE_NOTEBOOKS"):
        nbformat.write(notebook, path)
    else:
        assert shown == stored


def noise(notebook):
    """Warnings, and what TensorFlow logs."""
    streams = [
        output
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output.output_type == "stream"
    ]
    return [each.text for each in streams if each.name == "stderr" or ":tensorflow:" in each.text]


def outputs(cell):
    """Kinds of what a cell shows, without the values: those depend on the machine."""
    found = [
        output.get("name") or "/".join(sorted(output.data)) for output in cell.get("outputs", [])
    ]
    return ", ".join(dict.fromkeys(found))
