"""ImageClassifier: networks of timm and torchvision, on a folder of images."""

import json

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_rdrop.cli import RDropCLI
from lightning_rdrop.data import ImageFolderDataModule
from lightning_rdrop.dropout import stochastic_layers
from lightning_rdrop.modules import ImageClassifier

timm = pytest.importorskip("timm")

TINY = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 4, "num_heads": 2}
VIT = "vit_tiny_patch16_224"


@pytest.fixture
def folder(tmp_path):
    """Twelve images of three colours for training, and two of the colours for validation and test."""
    from PIL import Image

    colours = {"blue": (0, 0, 255), "green": (0, 255, 0), "red": (255, 0, 0)}
    for split, count in (("train", 4), ("val", 1), ("test", 1)):
        for name in [*colours][0 if split == "train" else 1 :]:
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (20, 24), colours[name]).save(tmp_path / "images" / split / name / f"{number}.png")
    return tmp_path / "images"


def batch(size=16, rows=4, classes=3):
    return torch.randn(rows, 3, size, size), torch.arange(rows) % classes


def probabilities(module, scope="element"):
    return {layer.name.removeprefix("network."): layer.p for layer in stochastic_layers(module) if layer.scope == scope}


def test_from_the_command_line(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    transforms = json.dumps({"input_size": [3, 16, 16]})
    cli = RDropCLI(
        args=[
            "fit", "--model=ImageClassifier", f"--model.architecture={VIT}", f"--model.model_args={json.dumps(TINY)}",
            "--model.dropout=0.1", "--model.drop_path=0.1", "--model.learning_rate=0.01",
            "--data=ImageFolderDataModule", f"--data.folder={folder}", f"--data.architecture={VIT}",
            f"--data.transforms={transforms}", "--data.augmentation={color_jitter: 0.0, hflip: 0.5}",
            "--data.batch_size=6", "--test_after_fit=true", "--trainer.accelerator=cpu", "--trainer.max_epochs=8",
            "--trainer.log_every_n_steps=1", "--trainer.logger=false", "--trainer.enable_progress_bar=false",
            "--trainer.check_val_every_n_epoch=8",
        ]
    )  # fmt: skip
    assert cli.trainer.callback_metrics["test/accuracy"] == 1
    assert cli.model.classes == cli.datamodule.labels == ["blue", "green", "red"]
    again = ImageClassifier.load_from_checkpoint(cli.trainer.checkpoint_callback.best_model_path)
    x, y = next(iter(cli.datamodule.test_dataloader()))
    assert y.tolist() == [1, 2]  # there is no blue one
    torch.testing.assert_close(again.eval()(x), cli.model.eval()(x))


def test_transforms_are_timms(folder):
    data = ImageFolderDataModule(str(folder), VIT, transforms={"input_size": [3, 16, 16]})
    (x, _), *_ = data.test_dataloader()
    assert x.shape == (2, 3, 16, 16)
    assert sorted(x.amin((2, 3))[0].tolist()) == [-1, -1, 1]  # around 0.5, as that model's, not as ImageNet's


def test_wrong_folders(folder):
    with pytest.raises(ValueError, match=r"no folder .*other.train\. Put the images"):
        ImageFolderDataModule(str(folder / "other")).setup("fit")
    with pytest.raises(ValueError, match=r"test.green is not one of the 1 classes \(red\)"):
        ImageFolderDataModule(str(folder), labels=["red"]).test_dataloader()


def test_a_test_folder_that_is_missing_is_found_before_training(folder, monkeypatch):
    (folder / "test" / "red").rename(folder / "test" / "rde")
    monkeypatch.setattr(pl.Trainer, "fit", lambda *arguments, **more: pytest.fail("trained"))
    arguments = [
        "fit", "--model=ImageClassifier", f"--model.architecture={VIT}", f"--model.model_args={json.dumps(TINY)}",
        "--data=ImageFolderDataModule", f"--data.folder={folder}", "--test_after_fit=true", "--trainer.accelerator=cpu",
        "--trainer.logger=false",
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"test.rde is not one of the 3 classes"):
        RDropCLI(args=arguments)
    (folder / "test").rename(folder / "tset")
    with pytest.raises(ValueError, match=r"There is no folder .*test\."):
        RDropCLI(args=arguments)


def test_dropout_of_timm():
    module = ImageClassifier(VIT, 3, dropout=0.1, drop_path=0.3, model_args=TINY)
    assert set(probabilities(module).values()) == {0.1}
    paths = [p for name, p in probabilities(module, "example").items() if name.endswith("drop_path1")]
    assert paths == pytest.approx([0.1, 0.2, 0.3])  # that of the first block is 0, and not there


def test_dropout_of_torchvision():
    module = ImageClassifier("torchvision.models.convnext_tiny", 3, drop_path=0.34)
    assert [*probabilities(module, "example").values()] == pytest.approx([0.02 * block for block in range(18)])
    module = ImageClassifier("torchvision.models.alexnet", 3, dropout=0.2)
    assert set(probabilities(module).values()) == {0.2}
    assert module.rdrop_step(batch(64, 2)).kl > 0


def test_frozen_blocks_run_once(fit):
    module = ImageClassifier(
        VIT, 3, dropout=0.1, drop_path=0.1, model_args=TINY, frozen_below="blocks.2", rdrop_duplicate_at="blocks.2",
        weight_decay=0.0,
    )  # fmt: skip
    before = {name: value.clone() for name, value in module.network.state_dict().items()}
    rows = {1: [], 2: []}
    for block, seen in rows.items():
        module.network.blocks[block].register_forward_hook(lambda part, x, y, seen=seen: seen.append(len(y)))
    trainer = fit(module, DataLoader(TensorDataset(*batch(rows=8)), 4))
    assert (rows[1][-1], rows[2][-1]) == (4, 8)
    assert trainer.callback_metrics["train/kl"] > 0
    changed = {name for name, value in module.network.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if name.startswith(("blocks.2", "blocks.3", "norm", "head"))}


def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        module = ImageClassifier(VIT, 3, dropout=0.1, model_args=TINY, gradient_checkpointing=checkpointing)
        images = batch()
        module.rdrop_step(images).loss.backward()
        gradients.append([parameter.grad for parameter in module.network.parameters()])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    ("name", "model_args"),
    [
        (VIT, TINY | {"init_values": 1e-6, "attn_drop_rate": 0.1}),
        ("convnext_atto", {"ls_init_value": 1e-6, "drop_path_rate": 0.2}),
    ],
)
def test_a_layer_scale_that_starts_tiny_hides_no_dropout(name, model_args):
    terms = ImageClassifier(name, 3, model_args=model_args).rdrop_step(batch(16 if name == VIT else 32))
    assert terms.kl < 1e-9  # and the guard does not take the views for identical


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"architecture": "vit_tiny_patch16_225"}, r"is not a timm model\. Did you mean vit_tiny_patch16_224"),
        ({"architecture": VIT, "model_args": {"drop_pth": 1}}, r"does not accept its arguments: .*drop_pth"),
        ({"architecture": "torchvision.models.alexnet", "drop_path": 0.1}, r"drop_path=0\.1 needs stochastic depth"),
        ({"architecture": "torchvision.models.alexnet", "pretrained": True}, r"pretrained=True needs a timm model"),
        ({"architecture": "torchvision.models.alexnet", "gradient_checkpointing": True}, r"needs a timm model"),
        ({"architecture": VIT, "frozen_below": "blcks.2"}, r"frozen_below='blcks\.2' is not a submodule"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        ImageClassifier(num_classes=3, **arguments)
