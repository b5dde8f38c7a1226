"""The code of the documentation and every example in a docstring runs."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import keras
import keras_tuner
import numpy as np
import pdoc
import pytest
import tensorflow as tf
from models import MODES

import tf_dropmax
from tf_dropmax import functional, plots, tuning

ROOT = next(folder for folder in Path(__file__).parents if (folder / "setup.cfg").exists())
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [README, *DOCS, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]

BLOCK = re.compile(r"^```(.*)\n((?:.*\n)*?)```$", re.MULTILINE)
NOT_PYTHON = ("shell", "text", "math")

MODULES = [
    module.name
    for module in pkgutil.walk_packages(tf_dropmax.__path__, "tf_dropmax.")
    if not module.name.startswith("tf_dropmax.experiments")
]

# Everything that users import, and the methods of the head.
PUBLIC = {
    f"{owner.__name__}.{name}": getattr(owner, name)
    for owner, names in [
        (tf_dropmax, sorted({*tf_dropmax.__all__} - {"functional"})),
        (functional, functional.__all__),
        (plots, plots.__all__),
        (
            tf_dropmax.DropMaxHead,
            ["from_dense", "mask_distribution", "retain_probabilities", "uncertainty"],
        ),
    ]
    for name in names
}


def test_every_file_that_the_results_name_exists():
    folder = ROOT / "docs" / "results"
    named = re.findall(r"`([\w/*-]+\.jsonl?)`", (folder / "README.md").read_text())
    named += re.findall(r"`([\w/*-]+\.jsonl?)`", (ROOT / "docs" / "results.md").read_text())
    assert named
    assert [name for name in named if not list(folder.glob(name))] == []
    listed = {path for name in named for path in folder.glob(name)}
    assert [path for path in folder.rglob("*.json*") if path not in listed] == []


def run(page):
    """Runs the Python blocks of a page, one after the other, and returns their names.

    A page trains as long as its readers need. Here two epochs are enough.
    """
    text, names = page.read_text(), {"__name__": page.stem}
    for block in BLOCK.finditer(text):
        language, code = block.groups()
        if language in NOT_PYTHON:
            continue
        assert language == "python", block[0]
        lines_above = text.count("\n", 0, block.start(2))
        code = re.sub(r"\bepochs=\d+", "epochs=2", code)
        exec(compile("\n" * lines_above + code, str(page), "exec"), names)
    return names


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_readme():
    names = run(README)
    np.testing.assert_allclose(names["probabilities"].sum(-1), 1, atol=1e-5)
    assert np.abs(names["exact"] - names["sampled"]).max() > 1e-3
    assert names["head"].predict_mode == "exact"
    assert names["head"].predict_temperature == pytest.approx(names["temperature"], rel=1e-6)
    assert names["swapped"].output_shape == (None, 10)


# keras 3.15 warns of every `InputLayer` in a model that it quantizes.
@pytest.mark.filterwarnings("ignore:Layer InputLayer does not have a `quantize`:UserWarning")
@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.stem)
def test_docs(page):
    run(page)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target


@pytest.mark.parametrize(
    ("page", "heading", "names"),
    [
        ("README.md", "Four ways to predict", MODES),
        ("docs/prediction.md", "The four modes", MODES),
        (
            "docs/prediction.md",
            "The output",
            ["classes", "logits", "retain_logits", "retain_probabilities"],
        ),
        ("docs/guide.md", "Pictures", plots.__all__),
    ],
)
def test_tables_are_complete(page, heading, names):
    _, section = (ROOT / page).read_text().split(f"## {heading}\n")
    rows = re.findall(r"^\| *(`[^|]*)\|", section.split("\n## ")[0], re.MULTILINE)
    rows = [row for row in rows if "=" not in row]
    assert sorted(re.findall(r'`"?(\w+)"?`', " ".join(rows))) == sorted(names)


def test_versions_agree():
    citation = re.search("^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    change = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert citation[1] == change[1] == tf_dropmax.__version__


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name, tmp_path):
    names = {"keras": keras, "np": np, "tf": tf, "tf_dropmax": tf_dropmax, "plots": plots}
    if name == tuning.__name__:
        names |= {"keras_tuner": keras_tuner, "tuning": tuning, "directory": tmp_path}
    assert doctest.testmod(importlib.import_module(name), globs=names).failed == 0


@pytest.mark.parametrize("name", PUBLIC)
def test_everything_public_has_an_example(name):
    thing = PUBLIC[name]
    assert doctest.DocTestParser().get_examples(thing.__doc__)
    assert thing.__module__ in MODULES  # So `test_docstrings` runs the examples.


# pdoc 16 cannot resolve the annotations of a `NamedTuple`, and shows them as they are written.
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
