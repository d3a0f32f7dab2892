"""Every recipe runs as it stands, is short, and trains by R-Drop."""

import runpy
from pathlib import Path

import pytest
import pytorch_lightning as pl

RECIPES = sorted((Path(__file__).parents[1] / "examples" / "recipes").glob("*.py"))
NEEDS = {"lora": ["transformers", "peft"], "mlm": ["transformers"], "two_crops": ["kornia"], "vit": ["timm"]}
"""What is imported besides the package; a recipe without it is skipped."""


class Steps(pl.Callback):
    def __init__(self):
        self.terms = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.terms.append((float(outputs["loss"]), float(outputs["ce"]), float(outputs["kl"])))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe(recipe, monkeypatch, tmp_path):
    for package in NEEDS.get(recipe.stem, []):
        pytest.importorskip(package)
    assert len(recipe.read_text().splitlines()) < 40
    monkeypatch.chdir(tmp_path)
    steps, plain = Steps(), pl.Trainer.__init__
    quiet = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False, "callbacks": [steps]}
    monkeypatch.setattr(pl.Trainer, "__init__", lambda self, **options: plain(self, **options | quiet))
    runpy.run_path(str(recipe), run_name="__main__")
    per_epoch = len(steps.terms) // 5
    (first, *_), (last, *_) = (
        [sum(column) for column in zip(*part, strict=True)]
        for part in (steps.terms[:per_epoch], steps.terms[-per_epoch:])
    )
    assert last < first
    begun = steps.terms[1:] if recipe.stem == "lora" else steps.terms  # an adapter starts at zero
    assert all(kl > 0 for _, _, kl in begun)
