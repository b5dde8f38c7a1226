"""Checks of arguments. Every message says what was expected and what was received."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Collection
from typing import Any

import numpy as np


def check_one_of(name: str, value: Any, choices: Collection[str]) -> str:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"`{name}` must be one of {tuple(choices)}. Received: {name}={value!r}")
    return value


def check_boolean(name: str, value: Any) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"`{name}` must be a bool. Received: {name}={value!r}")
    return bool(value)


def check_positive_int(name: str, value: Any, least: int = 1) -> int:
    if not _is_int(value) or value < least:
        raise ValueError(f"`{name}` must be an int of {least} or more. Received: {name}={value!r}")
    return int(value)


def check_optional_int(name: str, value: Any) -> int | None:
    if value is not None and not _is_int(value):
        raise TypeError(f"`{name}` must be an int or `None`. Received: {name}={value!r}")
    return None if value is None else int(value)


def check_number(name: str, value: Any, expected: str, valid: Callable[[float], bool]) -> float:
    """A Python, NumPy or eager TensorFlow number as a float."""
    number = np.asarray(value)
    if number.ndim > 0 or number.dtype.kind not in "iuf" or not valid(float(number)):
        raise ValueError(f"`{name}` must be {expected}. Received: {name}={value!r}")
    return float(number)


def check_weight(name: str, value: Any) -> float:
    # With larger weights, losses of large features overflow in float32.
    return check_number(name, value, "a float in [0, 1e6]", lambda x: 0 <= x <= 1e6)


def check_temperature(name: str, value: Any, largest: float = 1e6) -> float:
    expected = f"a float in [{1 / largest:g}, {largest:g}]"
    return check_number(name, value, expected, lambda x: 1 / largest <= x <= largest)


def check_fraction(name: str, value: Any) -> float:
    return check_number(name, value, "a float in (0, 1)", lambda x: 0 < x < 1)


def _is_int(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)
