"""The README's code and every example in a docstring runs."""

import doctest
import re
from pathlib import Path

import keras
import keras_tuner
import numpy as np
import pdoc
import pytest
import tensorflow as tf

import tf_dropmax
from tf_dropmax import callbacks, functional, head, losses, metrics, plots, tuning

ROOT = Path(__file__).parents[1]


def test_readme(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) >= 5
    names = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    np.testing.assert_allclose(names["probabilities"].sum(-1), 1, atol=1e-5)
    assert np.abs(names["exact"] - names["log_probabilities"]).max() > 1e-3
    assert names["loaded"].layers[-1].predict_mode == "exact"


def test_readme_names_the_modes():
    table = re.findall(r'^\| `"(\w+)"`', (ROOT / "README.md").read_text(), re.MULTILINE)
    assert sorted(table) == sorted(head.PREDICT_MODES)


@pytest.mark.parametrize(
    "module",
    [callbacks, functional, head, losses, metrics, plots, tuning],
    ids=lambda m: m.__name__,
)
def test_docstrings(module, tmp_path):
    names = {"keras": keras, "np": np, "tf": tf, "tf_dropmax": tf_dropmax, "plots": plots}
    if module is tuning:
        names |= {"keras_tuner": keras_tuner, "tuning": tuning, "directory": tmp_path}
    result = doctest.testmod(module, globs=names)
    assert result.attempted > 0
    assert result.failed == 0


def test_api_reference(tmp_path):
    command = re.search(
        r"pdoc (--docformat google) --output-directory \S+ (.*)", (ROOT / "Makefile").read_text()
    )
    pdoc.render.configure(docformat=command[1].split()[1])
    pdoc.pdoc(*command[2].split(), output_directory=tmp_path)
    page = (tmp_path / "tf_dropmax.html").read_text()
    for name in tf_dropmax.__all__:
        assert f'id="{name}"' in page or f"tf_dropmax/{name}.html" in page, name
    for name in ("functional", "plots", "tuning"):
        assert "Example" in (tmp_path / "tf_dropmax" / f"{name}.html").read_text()


def test_everything_public_has_an_example():
    functions = [getattr(functional, name) for name in dir(functional) if not name.startswith("_")]
    functions = [f for f in functions if getattr(f, "__module__", None) == functional.__name__]
    methods = [
        getattr(tf_dropmax.DropMaxHead, name)
        for name in ("from_dense", "retain_probabilities", "uncertainty")
    ]
    public = [getattr(tf_dropmax, name) for name in tf_dropmax.__all__ if name != "functional"]
    public += [
        f
        for f in vars(plots).values()
        if getattr(f, "__module__", None) == plots.__name__ and f.__name__[0] != "_"
    ]
    assert len(functions) == 19
    for thing in [*functions, *methods, *public]:
        assert ">>>" in thing.__doc__, thing
