"""How Sphinx makes the documentation: sphinx-build -W lightning_rdrop/docs build/docs"""

import re
from pathlib import Path
from typing import Any

import lightning_rdrop

project = "lightning-rdrop"
author = copyright = "The lightning-rdrop authors"
release = version = lightning_rdrop.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
html_theme = "furo"
html_title = f"{project} {release}"
myst_heading_anchors = 3

autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_inherit_docstrings = False  # Lightning's own are written for its own pages
autodoc_typehints_format = "short"
napoleon_custom_sections = [("Shapes", "params_style")]

# Every name of this package that a docstring mentions must lead somewhere. What only stands in a signature need not.
nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(?!lightning_rdrop\.)[\w.]+|dict\[str"),  # of other packages
    ("py:class", r"lightning_rdrop\.(_.*|\w+\._.*|description|late_duplication.duplicate_at|hooks|labels)\.\w+"),
    (
        "py:class",
        r"lightning_rdrop\.(checkpoint|data\.(chat|table|tokenizer)|distance\.(predictive|wrapped)|metrics\.row_means)\.\w+",
    ),
]

FILES = {"index": "README.md", "recipes": "examples/README.md", "contributing": "CONTRIBUTING.md"}
"""Pages whose text is a file of the repository. What they contain themselves is for readers on GitHub."""

TOCTREE = """

```{toctree}
:hidden:
:glob:
:caption: Guide

training
guard
*
```
"""


def take_from_file(app: Any, docname: str, source: list[str]) -> None:
    """Replace the page by the file, with links relative to the page."""
    if docname in FILES:
        root = Path(__file__).parents[2]
        folder = Path("../..", FILES[docname]).parent
        text = re.sub(r"\]\((?!\w+:|#)", f"]({folder}/", (root / FILES[docname]).read_text())
        for page, file in FILES.items():
            text = text.replace(f"](../../{file}", f"]({page}.md")
        source[0] = text + (TOCTREE if docname == "index" else "")
        app.env.note_dependency(str(root / FILES[docname]))


def setup(app: Any) -> None:
    app.connect("source-read", take_from_file)
