"""The argument parser of the command: errors in one line, help without markup."""

from __future__ import annotations

import os
import re
from typing import Any, NoReturn

from jsonargparse import ActionConfigFile, DefaultHelpFormatter  # type: ignore[attr-defined]
from pytorch_lightning.cli import LightningArgumentParser

from lightning_rdrop.lightning_cli.error_messages import explain

_ROLE = re.compile(r":\w+:`~?(?:[\w.]*\.)?(.+?)`")
_LITERAL = re.compile(r"``(.+?)``|`([^`\n]+?)(?: <[^>\n]*>)?`_?")


class PlainHelp(DefaultHelpFormatter):
    """Format help without the markup of the docstrings that it is made of."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return super()._split_lines(without_markup(text), width)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return super()._fill_text(without_markup(text), width, indent)


class MergedCallbacks(ActionConfigFile):
    """``--config`` that merges named callbacks with those of earlier files; jsonargparse replaces the mapping."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        named = {key: one for key, one in cfg.items() if key.split(".")[-1] == "callbacks" and isinstance(one, dict)}
        super().__call__(parser, cfg, values, option_string)  # type: ignore[no-untyped-call]
        for key, before in named.items():
            cfg[key] = before | cfg[key]


class RDropParser(LightningArgumentParser):
    """A parser with one-line error messages; with ``JSONARGPARSE_DEBUG=true`` it raises the full error."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, formatter_class=PlainHelp, **kwargs)

    def add_argument(self, *args: Any, **kwargs: Any) -> Any:
        """Like ``ArgumentParser.add_argument``, but named callbacks of config files are merged."""
        if kwargs.get("action") is ActionConfigFile:
            kwargs["action"] = MergedCallbacks
        return super().add_argument(*args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error or os.environ.get("JSONARGPARSE_DEBUG"):
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        self.exit(2, f"error: {explain(message, parser)}\n")


def without_markup(text: str) -> str:
    """Remove the roles and quotes of Sphinx from a text.

    Example:
        >>> without_markup("see :class:`~lightning_rdrop.modules.Task`, ``None`` or :func:`read_table`")
        'see Task, None or read_table'
    """
    text = _ROLE.sub(r"\1", text)
    return _LITERAL.sub(lambda match: match[1] or match[2], text)
