import gc
import os
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import HealthCheck, settings

# `make test` always tries the same few examples of a property, `make test-long` hundreds of others.
_SAME = {"deadline": None, "suppress_health_check": list(HealthCheck), "print_blob": True}
settings.register_profile("short", max_examples=25, derandomize=True, database=None, **_SAME)
settings.register_profile("long", max_examples=500, **_SAME)
PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "short")
settings.load_profile(PROFILE)

# Two replicas on any machine, for the tests of tf.distribute.
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
)


def pytest_collection_modifyitems(items):
    for item in items:
        if PROFILE == "long" and getattr(getattr(item, "obj", None), "hypothesis", None):
            item.add_marker(pytest.mark.long)


def pytest_collection_finish():
    # Garbage collection took a quarter of the time: tracing makes very many objects.
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)


@pytest.fixture(autouse=True)
def _same_start():
    keras.utils.set_random_seed(0)
    yield
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")


@pytest.fixture(autouse=True, scope="module")
def _clean_keras():
    yield
    keras.backend.clear_session()


@pytest.fixture(scope="session")
def strategy():
    """Two replicas. One strategy for all tests, because the collective operations of two mix."""
    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def golden():
    """Reference values that were computed without this package; see `golden/README.md`."""
    return dict(np.load(Path(__file__).parent / "golden" / "dropmax_golden.npz"))


@pytest.fixture(scope="session")
def blobs():
    """A small learnable problem: 4 classes, 160 rows, 6 features."""
    rng = np.random.default_rng(1)
    centres = rng.normal(size=(4, 6))
    y = np.arange(160) % 4
    return (centres[y] + 0.3 * rng.normal(size=(160, 6))).astype("float32"), y
