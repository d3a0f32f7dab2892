"""Write files so that a reader, also after an interruption, finds the whole old or the whole new text."""

from __future__ import annotations

from pathlib import Path


def write(path: Path, text: str) -> None:
    """Replace the text of a file atomically."""
    part = path.with_suffix(".part")
    part.write_text(text)
    part.replace(path)
