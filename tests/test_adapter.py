"""LoRA in the ready modules: trained, kept in checkpoints without its base, and loaded by peft alone."""

import csv
import json
from pathlib import Path

import pytest
import torch
from conftest import WORDS, texts, trained_on
from pytorch_lightning.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_rdrop.cli import RDropCLI
from lightning_rdrop.modules import CausalLM, Seq2Seq, SequenceClassifier, TokenClassifier

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

LORA = {"r": 2, "lora_dropout": 0.1, "target_modules": "all-linear"}


@pytest.fixture
def llama(folder):
    """Without any dropout of its own."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS), num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2, **sizes
    )
    return folder(transformers.LlamaForCausalLM(config))


def loaded(auto, base, adapter, **config):
    """By peft alone."""
    return peft.PeftModel.from_pretrained(getattr(transformers, auto).from_pretrained(base, **config), adapter).eval()


def test_from_the_command_line(llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"sentence": " ".join(WORDS[4 + (i + k) % 16] for k in range(6))} for i in range(24)]
    Path("train.json").write_text("\n".join(map(json.dumps, rows)))
    arguments = [
        "fit", "--model=CausalLM", f"--model.pretrained={llama}", f"--model.peft={json.dumps(LORA)}",
        "--model.gradient_checkpointing=true", "--model.learning_rate=0.02", "--data=TextDataModule",
        f"--data.tokenizer={llama}", "--data.train=train.json", "--data.val=train.json", "--data.label=null",
        "--data.batch_size=4", "--trainer.accelerator=cpu", "--trainer.log_every_n_steps=1",
        "--trainer.logger=CSVLogger", "--trainer.logger.save_dir=logs", "--trainer.enable_progress_bar=false",
    ]  # fmt: skip
    cli = RDropCLI(args=[*arguments, "--trainer.max_epochs=2"])
    with open(f"{cli.trainer.log_dir}/metrics.csv") as lines:
        kls = [float(row["train/kl"]) for row in csv.DictReader(lines) if row.get("train/kl")]
    assert kls[0] == 0  # B = 0
    assert all(kl > 0 for kl in kls[1:])
    best = cli.trainer.checkpoint_callback.best_model_path
    saved = torch.load(best, weights_only=True)["state_dict"]
    assert saved
    assert all("lora_" in name for name in saved)
    module = CausalLM.load_from_checkpoint(best).eval()
    inputs, _ = module.rdrop_unpack(texts(labels=False))
    by_peft = loaded("AutoModelForCausalLM", llama, Path(best).parent / "adapter")
    torch.testing.assert_close(by_peft(**inputs).logits[:, :-1], module.rdrop_predict(inputs))
    again = RDropCLI(args=[*arguments, "--trainer.max_epochs=3", f"--ckpt_path={best}"])
    assert again.trainer.global_step == 18


@pytest.mark.parametrize(
    ("task", "auto", "model"),
    [
        (Seq2Seq, "AutoModelForSeq2SeqLM", "t5"),
        (SequenceClassifier, "AutoModelForSequenceClassification", "bert"),
        (TokenClassifier, "AutoModelForTokenClassification", "bert"),
    ],
)
def test_every_module(fit, task, auto, model, request, tmp_path):
    base, batch = request.getfixturevalue(model), texts()
    settings = {"scores": []} if task is Seq2Seq else {"num_classes": 3}
    labels = {SequenceClassifier: torch.arange(4) % 3, TokenClassifier: torch.arange(28).view(4, 7) % 3}
    batch["labels"] = labels.get(task, batch["labels"])
    module = task(base, peft=LORA, learning_rate=0.02, **settings)
    loader = DataLoader([batch] * 3, batch_size=None)
    trainer = fit(module, loader, enable_checkpointing=True, max_epochs=2)
    assert trainer.callback_metrics["train/kl"] > 0
    files = Path(trainer.checkpoint_callback.best_model_path)
    saved = torch.load(files, weights_only=True)["state_dict"]
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert {*saved} == trained
    assert any("modules_to_save" in name for name in trained) == (task is not Seq2Seq)  # a new output layer
    again = task.load_from_checkpoint(files).eval()
    inputs, _ = again.rdrop_unpack(batch)
    config = {} if task is Seq2Seq else {"num_labels": 3}
    by_peft = loaded(auto, base, files.parent / "adapter", **config)
    torch.testing.assert_close(by_peft(**inputs).logits, again.rdrop_predict(inputs))
    torch.testing.assert_close(by_peft(**inputs).logits, module.eval().rdrop_predict(inputs))


def test_the_adapter_is_the_best_by_a_metric_or_that_of_the_end(fit, llama, tmp_path):
    def trained(*checkpoints):
        module = CausalLM(llama, peft=LORA, learning_rate=0.02)
        fit(module, DataLoader([texts(labels=False)] * 3, batch_size=None), checkpoints, enable_checkpointing=True)
        return module.eval()

    first, best = (
        ModelCheckpoint(tmp_path / "first", every_n_train_steps=2),
        ModelCheckpoint(tmp_path, monitor="train/ce"),
    )
    trained(first, best)
    assert (tmp_path / "adapter").exists()
    assert not (tmp_path / "first/adapter").exists()

    module = trained(ModelCheckpoint(tmp_path / "old", every_n_train_steps=2))
    inputs, _ = module.rdrop_unpack(texts(labels=False))
    by_peft = loaded("AutoModelForCausalLM", llama, tmp_path / "old/adapter")
    torch.testing.assert_close(by_peft(**inputs).logits[:, :-1], module.rdrop_predict(inputs))


def test_without_checkpoints_nothing_is_written(fit, llama, tmp_path):
    assert trained_on(fit, CausalLM(llama, peft=LORA), texts(labels=False))["train/kl"] >= 0
    assert not list(tmp_path.rglob("adapter*"))


def test_the_guard_advises_a_dropout_of_loras_own(llama):
    with pytest.raises(ValueError, match=r"LoRA without its own dropout: network\..*lora_dropout=0\.1"):
        CausalLM(llama, peft={"r": 2, "target_modules": ["q_proj"]}).rdrop_step(texts(labels=False))


def test_dropout_in_front_of_an_adapter_that_starts_at_zero_is_alive(llama, recwarn):
    """On the first batch kl is 0, whatever is dropped."""
    assert CausalLM(llama, peft=LORA).rdrop_step(texts(labels=False)).kl == 0
    assert not [one for one in recwarn if "identical" in str(one.message)]


def test_wrong_arguments(llama):
    with pytest.raises(ValueError, match=r"LoraConfig has no argument 'lora_droput'\. Did you mean lora_dropout\?"):
        CausalLM(llama, peft={"lora_droput": 0.1})
    with pytest.raises(ValueError, match=r"quantization=.*Pass peft as well"):
        CausalLM(llama, quantization={"load_in_4bit": True})


def test_quantization_is_passed_on(llama, monkeypatch):
    given = {}
    plain = transformers.AutoModelForCausalLM.from_pretrained

    def load(pretrained, **config):
        given.update(config)
        return plain(pretrained)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load)
    module = CausalLM(llama, peft=LORA, quantization={"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"})
    config = given["quantization_config"]
    assert isinstance(config, transformers.BitsAndBytesConfig)
    assert (config.load_in_4bit, config.bnb_4bit_quant_type) == (True, "nf4")
    assert all(parameter.requires_grad == ("lora_" in name) for name, parameter in module.named_parameters())


def test_gradient_checkpointing_changes_no_gradient(gpt2):
    """The masks of the way forward are those of the way back."""
    gradients = []
    for checkpointing in (False, True):
        module = CausalLM(gpt2, gradient_checkpointing=checkpointing)
        assert module.network.is_gradient_checkpointing == checkpointing
        torch.manual_seed(1)
        module.rdrop_step(texts(labels=False)).loss.backward()
        gradients.append([parameter.grad for parameter in module.network.parameters()])
    torch.testing.assert_close(*gradients)
