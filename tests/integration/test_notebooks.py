"""Every notebook runs as it is, and what it shows is stored in it.

`make notebooks` stores anew, by this test.
"""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))


def test_there_are_notebooks():
    assert len(NOTEBOOKS) == 6


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(path, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    stored = [outputs(cell) for cell in notebook.cells]
    place = {"metadata": {"path": tmp_path}}
    client = NotebookClient(
        notebook, timeout=170, resources=place, record_timing=False, coalesce_streams=True
    )
    client.execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            # The libraries of TensorFlow write to the terminal when they start.
            cell.outputs = [
                output
                for output in cell.outputs
                if output.get("name") != "stderr" or "Warning" in output.text
            ]
            assert not any(output.get("name") == "stderr" for output in cell.outputs), cell.outputs
    assert any("image/png" in kinds or "stdout" in kinds for kinds in map(outputs, notebook.cells))
    if os.environ.get("TF_DROPMAX_STORE_NOTEBOOKS"):
        nbformat.write(notebook, path)
    else:
        assert [outputs(cell) for cell in notebook.cells] == stored


def outputs(cell):
    """Kinds of what a cell shows, without the values: those depend on the machine."""
    found = [
        output.get("name") or "/".join(sorted(output.data)) for output in cell.get("outputs", [])
    ]
    return ", ".join(dict.fromkeys(found))
