from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_script_in_the_readme_is_the_one_that_runs():
    assert (ROOT / "examples/quickstart.py").read_text() in (ROOT / "README.md").read_text()


def test_ci_runs_the_test_command_of_the_readme():
    command = 'pip install -c constraints.txt -e ".[test]" && pytest'
    assert command in (ROOT / "README.md").read_text()
    assert command in (ROOT / ".ci/run").read_text()
