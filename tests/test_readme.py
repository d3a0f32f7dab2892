import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_it_is_short():
    assert len(README.splitlines()) <= 150
    first = re.search(r"(?ms)^```python\n(.*?)^```$", README)[1]
    assert sum(bool(line) for line in first.splitlines()) <= 25


def test_ci_runs_the_test_command_of_the_readme():
    command = 'pip install -c constraints.txt -e ".[test]" && pytest -n auto'
    assert command in README
    assert command in (ROOT / ".ci/run").read_text()


def test_both_sides_of_the_diff_are_python():
    lines = re.search(r"(?ms)^```diff\n(.*?)^```$", README)[1].splitlines()
    for side in "-+":
        code = "\n".join(line[1:] for line in lines if line[0] == side)
        compile(code, f"README.md, {side}", "exec")


def test_the_import_brings_no_extra():
    """Lightning and torchmetrics import what they find of these; the package itself imports none."""
    extras = {"jsonargparse", "transformers", "matplotlib", "rich", "tensorboard", "snownlp", "sklearn", "scipy"}
    lightnings = "import pytorch_lightning, lightning.pytorch, sys; before = set(sys.modules); "
    shown = "import lightning_rdrop; print(*{name.partition('.')[0] for name in {*sys.modules} - before})"
    command = [sys.executable, "-c", lightnings + shown]
    imported = subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert "lightning_rdrop" in imported
    assert not extras & set(imported)
