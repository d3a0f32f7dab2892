"""Mistaken command lines, each answered by one line."""

import pytest
import yaml
from test_cli import NETWORK

from lightning_rdrop.cli import main

LINE = (
    "fit --model=Classifier --model.network=mistaken.Network --model.num_classes=3 --data=mistaken.Data "
    "--trainer.accelerator=cpu --trainer.fast_dev_run=true"
)
OTHER_LIGHTNING = """
import lightning.pytorch as pl
class Module(pl.LightningModule): pass
class Data(pl.LightningDataModule): pass
"""
CONFIGS = {
    "argument.yaml": {"model": {"class_path": "Classifier", "init_args": {"num_clases": 3}}},
    "section.yaml": {"modle": {"class_path": "Classifier"}},
    "option.yaml": {"trainer": {"max_epoch": 3}},
    "callback.yaml": {"callbacks": {"alpha": {"class_path": "AlphaScheduler", "init_args": {"shpae": "linear"}}}},
    "value.yaml": {"trainer": {"max_epochs": "many"}},
}

MISTAKES = {
    "": "a subcommand is required: fit, validate, test, predict.",
    "fti": "there is no 'fti', only fit, validate, test, predict. Did you mean fit?",
    "fit": "--model is required.",
    "--trainer.max_epochs=3 fit": (
        "options come after the subcommand, as in lightning-rdrop fit --trainer.max_epochs."
    ),
    "LINE stray": "unexpected argument 'stray': options begin with --.",
    "LINE --ckpt_path": "argument --ckpt_path: expected one argument",
    "LINE --trainer.max_epcohs=3": "there is no option --trainer.max_epcohs. Did you mean --trainer.max_epochs?",
    "LINE --trainer.max_epochs=three": "trainer.max_epochs: must be int, got 'three'.",
    "LINE --trainer.logger=CSVLoger": "trainer.logger: there is no class CSVLoger. Did you mean CSVLogger?",
    "LINE --trainer.accelerator=gpuu": "You selected an invalid accelerator name: `accelerator='gpuu'`.",
    "LINE --callback.alpha=AlphaScheduler": "there is no option --callback.alpha. Did you mean --callbacks.alpha?",
    "LINE --callbacks=AlphaScheduler": (
        "callbacks: each needs a name. Write --callbacks.NAME=CLASS, such as --callbacks.alpha=AlphaScheduler."
    ),
    "LINE --callbacks.alpha=AlphaSchduler": (
        "callbacks: there is no class AlphaSchduler. Did you mean AlphaScheduler?"
    ),
    "LINE --callbacks.alpha=AlphaScheduler --callbacks.alpha.rmap=3": (
        "callbacks: AlphaScheduler has no argument rmap. Did you mean ramp?"
    ),
    "LINE --callbacks.alpha.ramp=3": (
        "callbacks: ramp comes before the class of its callback. Pass the class first: --callbacks.NAME=CLASS."
    ),
    "LINE --model.rdrop_alhpa=1": "model: Classifier has no argument rdrop_alhpa. Did you mean rdrop_alpha?",
    "LINE --model.rdrop_alpha=-1": "rdrop_alpha must be a finite number >= 0, got -1.0.",
    "LINE --model.rdrop_passes=seperate": (
        "model.rdrop_passes: must be joint or separate, got 'seperate'. Did you mean separate?"
    ),
    "LINE --model.num_classes=lots": "model.num_classes: must be int, got 'lots'.",
    "LINE --model.rdrop_distance=Gausian": ("model.rdrop_distance: there is no class Gausian. Did you mean Gaussian?"),
    "LINE --model.rdrop_distance=Categorical --model.rdrop_distance.weight=[1,two]": (
        "model.rdrop_distance.weight: must be float, got 'two'."
    ),
    "LINE --model.rdrop_regularizers+=VTA": "model.rdrop_regularizers: there is no class VTA. Did you mean VAT?",
    "LINE --model.network=mistaken.Netwrok": (
        "model.network: there is no Netwrok in mistaken. Did you mean mistaken.Network?"
    ),
    "LINE --model.network=mistakne.Network": "model.network: there is no module mistakne. Did you mean mistaken?",
    "LINE --data.row=3": "data: Data has no argument row. Did you mean rows?",
    "LINE --optimizer=Adm": "optimizer: there is no class Adm. Did you mean Adam?",
    "LINE --optimizer=Adam --optimizer.learning_rate=3": "optimizer: Adam has no argument learning_rate.",
    "LINE --predictions=out.csv": "there is no option --predictions.",
    "fit --model.pretrained=bert --model=SequenceClassifier": (
        "model: LightningModule has no argument pretrained. Pass --model=CLASS before its arguments."
    ),
    "fit --model=SequenceClassifier --model.num_classes=2 --model.pretrained=./nope": (
        "pretrained='./nope' cannot be loaded: "
    ),
    "fit --model=Clasifier": "model: there is no class Clasifier. Did you mean Classifier?",
    "fit --model=Classifier --data=mistaken.Data": "model: Classifier needs network.",
    "LINE --data=TextDataModule": "data: TextDataModule needs tokenizer.",
    "LINE --config=valeu.yaml": "config: there is no file FOLDER/valeu.yaml. Did you mean value.yaml?",
    "fit --config=argument.yaml": "model: Classifier has no argument num_clases. Did you mean num_classes?",
    "fit --config=section.yaml": "there is no option modle.class_path. Did you mean model.class_path?",
    "LINE --config=option.yaml": "there is no option trainer.max_epoch. Did you mean trainer.max_epochs?",
    "LINE --config=callback.yaml": "callbacks: AlphaScheduler has no argument shpae. Did you mean shape?",
    "LINE --config=value.yaml": "trainer.max_epochs: must be int, got 'many'.",
    "fit --model=other_lightning.Module": (
        "model: other_lightning.Module uses lightning.pytorch, but this command needs pytorch_lightning: write import "
        "pytorch_lightning as pl in its file."
    ),
    "LINE --data=other_lightning.Data": (
        "data: other_lightning.Data uses lightning.pytorch, but this command needs pytorch_lightning: write import "
        "pytorch_lightning as pl in its file."
    ),
    "predict LINE --predictions=out.txt": "predictions must be a .csv or .jsonl file, got 'out.txt'.",
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "mistaken.py").write_text(NETWORK)
    (tmp_path / "other_lightning.py").write_text(OTHER_LIGHTNING)
    for name, config in CONFIGS.items():
        (tmp_path / name).write_text(yaml.safe_dump(config))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("sys.argv", ["lightning-rdrop"])
    return tmp_path


@pytest.mark.parametrize(("given", "answer"), MISTAKES.items(), ids=MISTAKES)
def test_a_mistake_is_answered_in_one_line(folder, capsys, given, answer):
    line = LINE.removeprefix("fit ") if given.startswith("predict") else LINE
    with pytest.raises(SystemExit) as stopped:
        main(given.replace("LINE", line).split())
    assert stopped.value.code in (1, 2)
    said = [
        line
        for line in capsys.readouterr().err.splitlines()
        if not line.startswith(("Seed", "GPU", "TPU", "\U0001f4a1"))
    ]
    assert len(said) == 1
    answer = answer.replace("FOLDER", str(folder))
    assert said[0].startswith(f"error: {answer}")


def test_an_error_of_the_user_s_own_code_keeps_its_traceback(folder):
    (folder / "broken.py").write_text(
        "import torch\ndef make():\n    raise ValueError('mine')\nclass Net(torch.nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        make()\n"
    )
    with pytest.raises(ValueError, match="- mine"):
        main(LINE.replace("mistaken.Network", "broken.Net").split())


def test_every_line_of_an_error_can_be_had(folder, monkeypatch):
    monkeypatch.setenv("JSONARGPARSE_DEBUG", "true")
    with pytest.raises(Exception, match="Option 'rdrop_alhpa' is not accepted"):
        main([*LINE.split(), "--model.rdrop_alhpa=1"])


@pytest.mark.parametrize("given", ["--help", "fit --help", "fit --model.help=SequenceClassifier", "predict --help"])
def test_help_has_no_markup(folder, capsys, given):
    with pytest.raises(SystemExit):
        main(given.split())
    shown = capsys.readouterr().out
    assert "usage: lightning-rdrop" in shown
    assert "`" not in shown
    assert given == "--help" or "trainer" in shown or "warmup" in shown


def test_version(folder, capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.startswith("lightning-rdrop 0.")
