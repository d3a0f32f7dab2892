"""`lightning-rdrop quickstart`: write a first experiment to a folder."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

FILES = ("quickstart.yaml", "reviews.py", "fasttext.py")
"""A config, its data and its network, from the examples of the repository; the wheel includes a copy."""
NEEDED = ("snownlp", "matplotlib", "tensorboard")
"""Packages that they import."""


def quickstart(args: Sequence[str]) -> None:
    """Write the files of the quickstart, and say how to run them."""
    parser = argparse.ArgumentParser(
        prog="lightning-rdrop quickstart",
        description="Write a config, its data and its network to a folder: Chinese reviews, a minute on two cores.",
    )
    parser.add_argument("folder", nargs="?", default=".", type=Path, help="target (default: the current folder)")
    folder = parser.parse_args(args).folder
    texts = {name: (_source() / name).read_text("utf8").replace("examples.", "") for name in FILES}
    texts = {name: text.replace("examples/", "") for name, text in texts.items()}
    other = [name for name in FILES if (folder / name).exists() and (folder / name).read_text("utf8") != texts[name]]
    if other:
        raise FileExistsError(f"{folder / other[0]} already exists with other content. Pass an empty folder.")
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_text(text, "utf8")
    print(f"Wrote {', '.join(str(folder / name) for name in FILES)}. Now run")
    if not all(map(find_spec, NEEDED)):
        print('    pip install "lightning-rdrop[examples]"')
    if folder != Path("."):
        print(f"    cd {folder}")
    print("    lightning-rdrop fit --config quickstart.yaml")


def _source() -> Path:
    package = Path(__file__).parent
    in_wheel = package / "quickstart_files"
    return in_wheel if in_wheel.exists() else package.parent / "examples"
