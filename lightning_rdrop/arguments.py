"""Argument checks with messages that say what is allowed."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from numbers import Integral, Real
from typing import SupportsIndex, TypeVar

import torch
from torch import Tensor

Word = TypeVar("Word", bound=str)


def non_negative(name: str, value: float) -> float:
    """Return the value as an int or float if it is a finite number >= 0, including numpy's.

    Raises:
        ValueError: it is not.

    Example:
        >>> non_negative("alpha", -1.0)
        Traceback (most recent call last):
        ValueError: alpha must be a finite number >= 0, got -1.0.
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be a finite number >= 0, got {value!r}.")
    return value if type(value) is int else float(value)


def positive(name: str, value: float, meaning: str = "") -> float:
    """Return the value as an int or float if it is a finite number > 0, including numpy's.

    Raises:
        ValueError: it is not.

    Example:
        >>> positive("temperature", 0, " (0.05 is the default)")
        Traceback (most recent call last):
        ValueError: temperature must be > 0 (0.05 is the default), got 0.
    """
    if not (number := non_negative(name, value)):
        raise ValueError(f"{name} must be > 0{meaning}, got {value!r}.")
    return number


def whole(name: str, value: SupportsIndex, least: int = 1, meaning: str = "") -> int:
    """Return the value as an int if it is an integer >= ``least``, including numpy's.

    Raises:
        ValueError: it is not.

    Example:
        >>> whole("views", 2.0)
        Traceback (most recent call last):
        ValueError: views must be an int >= 1, got 2.0.
    """
    try:
        number = least - 1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = least - 1
    if number < least:
        raise ValueError(f"{name} must be an int >= {least}{meaning}, got {value!r}.")
    return number


def probability(name: str, value: float, *, below_one: bool = False) -> float:
    """Return the value as a float if it is in [0, 1], or in [0, 1) if it must be below 1, including numpy's.

    Raises:
        ValueError: it is not.

    Example:
        >>> probability("p", 30)
        Traceback (most recent call last):
        ValueError: p must be a probability, 0 <= p <= 1, got 30.
    """
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number or not (0 <= value < 1 or (value == 1 and not below_one)):
        raise ValueError(f"{name} must be a probability, 0 <= {name} {'<' if below_one else '<='} 1, got {value!r}.")
    return float(value)


def duration(name: str, value: int | float) -> int | float:
    """Return a number of optimizer steps as an int, or a share of training as a float in [0, 1].

    An integral float above 1, as a parser may return for ``400``, is a number of steps.

    Raises:
        TypeError: it is not a number.
        ValueError: it is negative, NaN, or neither of the two.

    Example:
        >>> duration("ramp", 100), duration("ramp", 100.0), duration("ramp", 0.1)
        (100, 100, 0.1)
        >>> duration("ramp", 1.5)
        Traceback (most recent call last):
        ValueError: ramp must be an int >= 0, a number of optimizer steps, or a float in [0, 1], ..., got 1.5.
    """
    allowed = "an int >= 0, a number of optimizer steps, or a float in [0, 1], a share of training"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be {allowed}, got {value!r}.")
    is_steps = isinstance(value, Integral) or (value > 1 and float(value).is_integer())
    if not value >= 0 or not (is_steps or value <= 1):
        raise ValueError(f"{name} must be {allowed}, got {value!r}.")
    return int(value) if is_steps else float(value)


def one_of(name: str, value: Word, allowed: Sequence[Word]) -> Word:
    """Return the value if it is one of the allowed words.

    Raises:
        ValueError: it is not.

    Example:
        >>> one_of("passes", "joint", ("joint", "separate"))
        'joint'
    """
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}.")
    return value


def tensor(name: str, value: Tensor) -> Tensor:
    """Return the value if it is a tensor.

    Raises:
        TypeError: it is not.

    Example:
        >>> tensor("target", [0, 1])
        Traceback (most recent call last):
        TypeError: target must be a tensor, got a list: torch.as_tensor(...) makes one.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got a {type(value).__name__}: torch.as_tensor(...) makes one.")
    return value


def weights(name: str, value: Tensor | Sequence[float] | None) -> Tensor | None:
    """Return the weights of classes or labels as a tensor, in float32 or better for a list, or None.

    Raises:
        TypeError: they are not numbers.

    Example:
        >>> weights("weight", [1.0, 2.0])
        tensor([1., 2.])
        >>> weights("weight", "balanced")
        Traceback (most recent call last):
        TypeError: weight must be a tensor or a list of numbers, such as [1.0, 2.0], got 'balanced'.
    """
    if value is None or isinstance(value, Tensor):
        return value
    try:
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
        return torch.tensor(value, dtype=dtype, device="cpu")  # with values, also where modules are made without memory
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a tensor or a list of numbers, such as [1.0, 2.0], got {value!r}.") from None
