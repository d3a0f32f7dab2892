"""What the documentation shows works: every Python block, every command line, every name that a docstring mentions."""

import re
import shlex
from io import StringIO
from pathlib import Path

import pytest

import lightning_rdrop.callbacks
import lightning_rdrop.modules
from lightning_rdrop.cli import RDropCLI
from lightning_rdrop.compare.command import parser
from lightning_rdrop.compare.plan import Plan

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "lightning_rdrop/docs"
PAGES = [*(ROOT / file for file in ("README.md", "CONTRIBUTING.md", "examples/README.md")), *sorted(DOCS.glob("*.md"))]
BLOCK = re.compile(r"(?ms)^```python\n(.*?)^```$")
COMMAND = re.compile(
    r"^(?: {4}|\| .*`)lightning-rdrop ((?:fit|validate|test|predict) (?:.*\\\n)*[^`\n]*)", re.MULTILINE
)
COMPARE = re.compile(r"^ {4}lightning-rdrop compare ((?:.*\\\n)*.*--out .*)$", re.MULTILINE)
COMMANDS = [(page, command.replace("\\\n", "")) for page in PAGES for command in COMMAND.findall(page.read_text())]


def name(page):
    return str(page.relative_to(ROOT))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", [page for page in PAGES if BLOCK.search(page.read_text())], ids=name)
def test_every_python_block_runs(page, tmp_path, monkeypatch):
    """The blocks of a page one after the other, in an empty folder; an error names the line of the page."""
    monkeypatch.chdir(tmp_path)
    text = page.read_text()
    variables = {"__name__": "__main__"}
    for block in BLOCK.finditer(text):
        lines = "\n" * (text.count("\n", 0, block.start()) + 1)
        exec(compile(lines + block[1], page, "exec"), variables)


@pytest.mark.parametrize(
    ("page", "command"), COMMANDS, ids=[f"{name(page)}-{command[:60]}" for page, command in COMMANDS]
)
def test_every_command_line_is_understood(page, command, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stopped:
        RDropCLI(args=[*shlex.split(command), "--print_config"])
    assert stopped.value.code in (None, 0)


@pytest.mark.parametrize("page", [page for page in PAGES if COMPARE.search(page.read_text())], ids=name)
def test_every_comparison_is_understood(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    for command in COMPARE.findall(page.read_text()):
        asked = parser().parse_args(shlex.split(command.replace("\\\n", "")))
        assert Plan.of(asked.config, asked.variant, asked.grid, asked.seed_to).variants


def test_it_builds_without_a_warning_and_has_every_public_name(tmp_path):
    sphinx = pytest.importorskip("sphinx.application")
    said = StringIO()
    # "dummy" resolves every reference, and writes nothing
    built = sphinx.Sphinx(DOCS, DOCS, tmp_path, tmp_path, "dummy", status=None, warning=said)
    built.build()
    assert said.getvalue() == ""
    documented = {known.rpartition(".")[2] for known in built.env.get_domain("py").objects}
    for room in (lightning_rdrop, lightning_rdrop.callbacks, lightning_rdrop.modules):
        assert not set(room.__all__) - documented
