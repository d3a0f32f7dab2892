"""The classes that the rows of a table belong to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

from lightning_rdrop.data.cells import class_name
from lightning_rdrop.data.table import Row, Table


@runtime_checkable
class KnowsClasses(Protocol):
    """Data that know the classes of their examples."""

    labels: list[str] | None
    """Their names in the order of their indices, if they are known."""

    def known_labels(self) -> list[str] | None:
        """The same, found out if need be; None if the labels are no classes."""


def check_classes(table: Table, classes: Callable[[Row], Sequence[Any]], known: Sequence[str] | None) -> None:
    """All are texts or all are integers, and all are known.

    Args:
        table: of rows with labels.
        classes: those of a row.
        known: the names that are allowed; None allows all.

    Raises:
        ValueError: a class is something else, with its place.

    Example:
        >>> check_classes(Table([{"label": 1}, {"label": "b"}], "t.json"), lambda row: [row["label"]], None)
        Traceback (most recent call last):
        ValueError: t.json, row 2: the label 'b' is a str, and one before it an int. Write all as texts.
    """
    names = None if known is None else set(known)
    kinds: dict[str, Any] = {}

    def check(row: Row) -> None:
        for label in classes(row):
            name = class_name(label)
            kind = "int" if isinstance(label, float) else type(label).__name__
            other = next((other for other in kinds if other != kind), None)
            if other is not None:
                raise ValueError(f"the label {label!r} is a {kind}, and one before it an {other}. Write all as texts.")
            kinds[kind] = label
            if names is not None and name not in names:
                raise ValueError(f"the label {name!r} is none of the {len(names)} classes {some(known or ())}.")

    table.check(check)


def distinct(labels: Sequence[Any]) -> list[str]:
    """The names of classes.

    Raises:
        ValueError: one of them twice.

    Example:
        >>> distinct(["good", "bad"])
        ['good', 'bad']
    """
    names = [class_name(label) for label in labels]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ValueError(f"labels has {sorted(twice)[0]!r} twice.")
    return names


def some(names: Sequence[str]) -> str:
    """Names in brackets, ten at most.

    Example:
        >>> some(["good", "bad"])
        '(good, bad)'
    """
    return f"({', '.join(names[:10])}{', ...' if len(names) > 10 else ''})"
