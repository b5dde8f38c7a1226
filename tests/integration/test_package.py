"""The package as others get it."""

import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

import tf_dropmax

ROOT = Path(__file__).parents[2]


def run(*command, check=True, **kwargs):
    settings = {"check": check, "capture_output": True, "text": True, "timeout": 300}
    return subprocess.run(command, **settings, **kwargs)


@pytest.mark.long
def test_the_wheel_is_complete_and_imports_elsewhere(tmp_path):
    """The environment is new. It sees the dependencies of this one, so nothing is downloaded."""
    source = tmp_path / "source"  # a copy, without what an earlier build may have left
    left_out = shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, source, ignore=left_out)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation"]
    run(*build, "--outdir", tmp_path, source)
    (wheel,) = tmp_path.glob("tf_dropmax-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "tf_dropmax").rglob("*.py")}
    assert {*modules, "tf_dropmax/py.typed"} <= names
    assert any(name.endswith("/LICENSE") for name in names)
    assert not [name for name in names if name.startswith(("tests", "notebooks", "docs"))]
    assert not [name for name in names if ".json" in name]

    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python]
    run(*pip, "install", "--no-deps", "--no-index", wheel)
    code = (
        f"import site, sys; sys.path.append({sysconfig.get_path('purelib')!r}); import tf_dropmax; "
        "print(tf_dropmax.__file__, tf_dropmax.__version__)"
    )
    path, version = run(python, "-I", "-c", code, cwd=tmp_path).stdout.split()
    assert Path(path).is_relative_to(tmp_path / "env")
    assert version == tf_dropmax.__version__


def test_the_library_does_not_need_the_extras():
    hide = "import sys; sys.modules.update(dict.fromkeys(['matplotlib', 'scipy', 'sklearn']));"
    code = f"""{hide} import keras, numpy as np, tf_dropmax
model = keras.Sequential([keras.Input((4,)), tf_dropmax.DropMaxHead(3)])
tf_dropmax.calibrate(model, np.ones((6, 4)), np.arange(6) % 3)
assert not [m for m in sys.modules if m.startswith(("tf_dropmax.experiments", "keras_tuner"))]
import tf_dropmax.plots
"""
    ended = run(sys.executable, "-c", code, check=False)
    assert ended.returncode
    assert "pip install 'tf_dropmax[plots]'" in ended.stderr
