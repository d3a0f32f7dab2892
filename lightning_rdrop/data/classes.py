"""The classes of the rows of a table."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

from lightning_rdrop.data.cells import spell
from lightning_rdrop.data.table import Row, Table


@runtime_checkable
class KnowsClasses(Protocol):
    """A data module that knows the classes of its examples."""

    labels: list[str] | None
    """Class names in index order; None if not known yet."""

    def known_labels(self) -> list[str] | None:
        """The class names, read from the data if necessary; None if the labels are not classes."""


def class_name(value: Any) -> str:
    """The name of a class: a text without surrounding whitespace, an integer, which pandas may write as 1.0, or a bool.

    Raises:
        ValueError: the value is none of these.

    Example:
        >>> class_name(" good"), class_name(3), class_name(3.0), class_name(True)
        ('good', '3', '3', 'true')
    """
    if isinstance(value, bool):
        return str(value).lower()  # as in JSON
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    name = str(value).strip()
    if not isinstance(value, (str, int)) or not name:
        raise ValueError(f"a class must be a text or an integer, got {spell(value)}.")
    return name


def fraction(names: Iterable[str]) -> str | None:
    """The first fraction among names that are all numbers; None if one is not a number, or all are integers.

    Example:
        >>> fraction(["1", "4.5"]), fraction(["1.0", "2.0"]), fraction(["1.5", "none"])
        ('4.5', None, None)
    """
    try:
        numbers = {name: float(name) for name in names}
    except ValueError:
        return None
    if not all(map(math.isfinite, numbers.values())):
        return None
    return next((name for name, number in numbers.items() if not number.is_integer()), None)


def in_order(names: Iterable[str]) -> list[str]:
    """Class names in index order: sorted as numbers if all are integers, else as texts.

    Example:
        >>> in_order({"10", "9"}), in_order({"10", "9", "none"})
        (['9', '10'], ['10', '9', 'none'])
    """
    names = sorted(names)
    if all(name.removeprefix("-").isdecimal() for name in names):
        names.sort(key=int)
    return names


def check_classes(table: Table, classes: Callable[[Row], Sequence[Any]], known: Sequence[str] | None) -> None:
    """Check that all classes are texts or all are integers, and that all are known.

    Args:
        table: rows with labels.
        classes: returns the classes of a row.
        known: the allowed names; None allows all.

    Raises:
        ValueError: a class is invalid; the message has its place.

    Example:
        >>> check_classes(Table([{"label": 1}, {"label": "b"}], "t.json"), lambda row: [row["label"]], None)
        Traceback (most recent call last):
        ValueError: t.json, row 2: the label 'b' has the type str, but an earlier one int. Write all labels as texts.
    """
    names = None if known is None else set(known)
    kinds: dict[str, Any] = {}

    def check(row: Row) -> None:
        for label in classes(row):
            name = class_name(label)
            kind = "int" if isinstance(label, float) else type(label).__name__
            other = next((other for other in kinds if other != kind), None)
            if other is not None:
                raise ValueError(
                    f"the label {label!r} has the type {kind}, but an earlier one {other}. Write all labels as texts."
                )
            kinds[kind] = label
            if names is not None and name not in names:
                raise ValueError(f"the label {name!r} is not one of the {len(names)} classes {some(known or ())}.")

    table.check(check)


def distinct(labels: Sequence[Any]) -> list[str]:
    """The names of classes that must be distinct.

    Raises:
        ValueError: a name occurs twice.

    Example:
        >>> distinct(["good", "bad"])
        ['good', 'bad']
    """
    names = [class_name(label) for label in labels]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ValueError(f"labels contains {sorted(twice)[0]!r} twice.")
    return names


def some(names: Sequence[str]) -> str:
    """At most ten names in parentheses, for a message.

    Example:
        >>> some(["good", "bad"])
        '(good, bad)'
    """
    return f"({', '.join(names[:10])}{', ...' if len(names) > 10 else ''})"
