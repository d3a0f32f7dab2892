"""The ready modules of Hugging Face models and of numbers: each in a real Trainer, each loss against a formula."""

import pytest
import torch
from scipy.stats import pearsonr, spearmanr
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_rdrop import Gaussian, RDropLoss
from lightning_rdrop.modules import (
    CausalLM,
    MultilabelClassifier,
    Regressor,
    Seq2Seq,
    SequenceMultilabelClassifier,
    SequenceRegressor,
    TokenClassifier,
)

transformers = pytest.importorskip("transformers")

WORDS = ["<pad>", "<s>", "</s>", "<unk>", *"abcdefghijklmnop"]
SIZES = {"vocab_size": len(WORDS), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


@pytest.fixture
def folder(tmp_path):
    """Write a tiny model, and a tokenizer of single letters."""

    def write(model):
        from tokenizers import Tokenizer, models, pre_tokenizers

        letters = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
        letters.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=letters, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
        )
        model.save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        return str(tmp_path / "model")

    return write


@pytest.fixture
def bart(folder):
    settings = transformers.BartConfig(
        d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=16, decoder_start_token_id=2, **SIZES,
    )  # fmt: skip
    return folder(transformers.BartForConditionalGeneration(settings))


@pytest.fixture
def gpt2(folder):
    settings = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=16, **SIZES)
    return folder(transformers.GPT2LMHeadModel(settings))


@pytest.fixture
def bert(folder):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return folder(transformers.BertModel(transformers.BertConfig(vocab_size=len(WORDS), **sizes)))


def texts(labels=True):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, 20, (4, 7), generator=generator)
    mask = (torch.arange(7) < torch.tensor([[7], [5], [3], [6]])).long()
    batch = {"input_ids": ids * mask, "attention_mask": mask}
    if labels:
        targets = torch.randint(4, 20, (4, 5), generator=generator)
        targets[1:3, 3:] = -100
        batch["labels"] = targets
    return batch


def trained(fit, module, *batches):
    loader = DataLoader([*batches], batch_size=None)
    module.val_dataloader = lambda: loader
    return fit(module, loader, num_sanity_val_steps=0).callback_metrics


def test_seq2seq_is_trained_on_what_hugging_face_would_compute(bart):
    module, batch = Seq2Seq(bart).eval(), texts()
    inputs, target = module.rdrop_unpack(batch)
    ours = RDropLoss()(module.rdrop_predict(inputs)[None], target, 0.0)
    torch.testing.assert_close(ours.ce, module.network(**batch).loss)
    assert ours.rows == (batch["labels"] != -100).sum()
    smoothed = Seq2Seq(bart, label_smoothing=0.1).eval()
    logits = smoothed.network(**batch).logits.flatten(0, 1)
    expected = F.cross_entropy(logits, batch["labels"].flatten(), label_smoothing=0.1)
    assert smoothed.rdrop_distance.label_smoothing == 0.1
    torch.testing.assert_close(smoothed.rdrop_distance.to_target(logits, batch["labels"].flatten()).mean, expected)


@pytest.mark.parametrize("characters", [False, True])
def test_seq2seq_generates_and_scores(fit, bart, characters, tmp_path):
    scores = ["sacrebleu", "chrf", "rouge"]
    module = Seq2Seq(bart, scores, characters=characters, max_new_tokens=6, num_beams=2, learning_rate=1e-2)
    metrics = trained(fit, module, texts(), texts())
    assert metrics["train/kl"] > 0
    assert {"val/ce", "val/sacrebleu", "val/chrf", "val/rouge"} <= set(metrics)
    generated = module.eval().predict_step(texts(labels=False), 0)
    assert len(generated) == 4
    assert all(isinstance(text, str) and "<" not in text for text in generated)
    module.trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = Seq2Seq.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    torch.testing.assert_close(again.state_dict(), module.state_dict())


def test_seq2seq_scores_are_those_of_the_generated_text(fit, bart):
    module = Seq2Seq(bart, ["rouge"], max_new_tokens=6, num_beams=3)
    parrot = texts()
    given = {}

    def generate(**arguments):
        given.update(arguments)
        return parrot["labels"].clamp(min=0)  # word for word

    module.network.generate = generate
    metrics = trained(fit, module, parrot)
    assert metrics["val/rouge"] == pytest.approx(1.0)
    assert (given["max_new_tokens"], given["num_beams"]) == (6, 3)


@pytest.mark.parametrize("characters", [False, True])
def test_seq2seq_scores_by_hand(bart, characters):
    metrics = Seq2Seq(bart, ["sacrebleu", "chrf", "rouge"], characters=characters).val_metrics
    scores = metrics(["ab cdefg"], [["ab cdef"]])
    orders = range(1, 7)  # n letters: 7 - n of 8 - n generated ones are right, and none is missing
    chrf = [(1 + 4) * p / (4 * p + 1) for p in [(7 - n) / (8 - n) for n in orders]]
    if characters:
        assert scores["val/sacrebleu"] == pytest.approx((6 / 7 * 5 / 6 * 4 / 5 * 3 / 4) ** 0.25)
        assert scores["val/rouge"] == pytest.approx(14 / 15)  # the space is one of the 8
        assert scores["val/chrf"] == pytest.approx(sum(chrf) / 6)
    else:
        assert scores["val/sacrebleu"] == 0  # no two words in a row
        assert scores["val/rouge"] == pytest.approx(1 / 2)
        assert scores["val/chrf"] == pytest.approx((sum(chrf) + 1 / 2 + 0) / 8)  # and words, one and two in a row


def test_seq2seq_without_scores_generates_nothing(fit, bart):
    module = Seq2Seq(bart, [])
    module.network.generate = lambda **given: pytest.fail("generated")
    assert trained(fit, module, texts())["val/ce"] > 0
    with pytest.raises(ValueError, match=r"'sacrebleu', 'chrf', 'rouge', got 'bleu'"):
        Seq2Seq(bart, ["rouge", "bleu"])


def test_seq2seq_of_a_model_that_shifts_in_its_forward_only(folder):
    settings = transformers.M2M100Config(
        d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=16, decoder_start_token_id=2, **SIZES,
    )  # fmt: skip
    module, batch = Seq2Seq(folder(transformers.M2M100ForConditionalGeneration(settings))).eval(), texts()
    assert not hasattr(module.network, "prepare_decoder_input_ids_from_labels")  # as BART has it
    inputs, target = module.rdrop_unpack(batch)
    ours = module.rdrop_distance.to_target(module.rdrop_predict(inputs), target)
    torch.testing.assert_close(ours.mean, module.network(**batch).loss)


def test_nan_in_validation_is_not_left_out(fit, gpt2):
    module, (good, bad) = CausalLM(gpt2), (texts(labels=False), texts(labels=False))
    module.measure = lambda *batch: None
    predict = module.rdrop_predict
    module.rdrop_predict = lambda inputs: (
        predict(inputs) + (torch.nan if not module.training and (inputs["input_ids"] == bad["input_ids"]).all() else 0)
    )
    bad["input_ids"] = bad["input_ids"].flip(0)
    assert trained(fit, module, good, bad)["val/ce"].isnan()


def test_seq2seq_without_labels_is_refused(bart):
    with pytest.raises(ValueError, match=r"input_ids, attention_mask and no labels.*decoder"):
        Seq2Seq(bart).rdrop_step(texts(labels=False))


def test_causal_lm_is_shifted_as_hugging_faces(gpt2):
    module, batch = CausalLM(gpt2).eval(), texts(labels=False)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    expected = module.network(**batch, labels=labels).loss
    for given in (batch, batch | {"labels": labels}):
        inputs, target = module.rdrop_unpack(given)
        torch.testing.assert_close(RDropLoss()(module.rdrop_predict(inputs)[None], target, 0.0).ce, expected)


def test_causal_lm_perplexity_is_exact_over_tokens(fit, gpt2):
    module = CausalLM(gpt2, learning_rate=0.0)
    long, short = texts(labels=False), {name: value[2:3, :3] for name, value in texts(labels=False).items()}
    metrics = trained(fit, module, long, short)
    module.eval()
    nll, tokens = 0.0, 0
    for batch in (long, short):
        inputs, target = module.rdrop_unpack(batch)
        average = module.rdrop_distance.to_target(module.rdrop_predict(inputs), target)
        nll, tokens = nll + average.total, tokens + average.weight
    torch.testing.assert_close(metrics["val/ce"], nll / tokens)
    torch.testing.assert_close(metrics["val/perplexity"], (nll / tokens).exp())
    assert metrics["train/kl"] > 0


def test_token_classifier(fit, bert):
    batch = texts(labels=False)
    batch["labels"] = (batch["input_ids"] % 3).masked_fill(batch["attention_mask"] == 0, -100)
    module = TokenClassifier(bert, num_classes=3, learning_rate=1e-2)
    metrics = trained(fit, module, batch, batch)
    assert metrics["train/kl"] > 0
    logits = module.eval().network(batch["input_ids"], batch["attention_mask"]).logits
    right = (logits.argmax(-1) == batch["labels"])[batch["labels"] != -100].float().mean()
    torch.testing.assert_close(metrics["val/accuracy"], right)
    torch.testing.assert_close(module.predict_step(batch, 0), logits.softmax(-1))


def test_sequence_regressor(fit, bert):
    batch = texts(labels=False) | {"labels": torch.tensor([0.0, 1.0, 2.0, 5.0])}
    module = SequenceRegressor(bert, learning_rate=1e-3)
    metrics = trained(fit, module, batch)
    assert metrics["train/mse"] > 0
    assert metrics["train/kl"] > 0
    prediction = module.eval().predict_step(batch, 0)
    assert prediction.shape == (4,)
    torch.testing.assert_close(metrics["val/mse"], F.mse_loss(prediction, batch["labels"]))


def test_sequence_multilabel_classifier(fit, bert, tmp_path):
    batch = texts(labels=False) | {"labels": torch.tensor([[0, 1, 0], [1, 1, 0], [0, 0, 0], [1, 0, 1]])}
    module = SequenceMultilabelClassifier(bert, num_labels=3, learning_rate=1e-3)
    metrics = trained(fit, module, batch)
    assert metrics["train/kl"] > 0
    probabilities = module.eval().predict_step(batch, 0)
    torch.testing.assert_close(metrics["val/bce"], F.binary_cross_entropy(probabilities, batch["labels"].float()))
    module.trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = SequenceMultilabelClassifier.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    torch.testing.assert_close(again.state_dict(), module.state_dict())


def test_regressor_on_diabetes(fit):
    datasets = pytest.importorskip("sklearn.datasets")
    x, y = (torch.tensor(column, dtype=torch.float32) for column in datasets.load_diabetes(return_X_y=True))
    x, y = x / x.std(0), (y - y.mean()) / y.std()
    network = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 1), nn.Flatten(0))
    module = Regressor(network, learning_rate=1e-2, rdrop_alpha=1.0)
    loader = DataLoader(TensorDataset(x, y), batch_size=64)
    module.val_dataloader = lambda: loader
    metrics = fit(module, loader, max_epochs=5, num_sanity_val_steps=0).callback_metrics
    prediction = module.eval()(x).detach()
    torch.testing.assert_close(metrics["val/mse"], F.mse_loss(prediction, y))
    assert metrics["val/mse"] < 0.6
    assert metrics["val/pearson"].item() == pytest.approx(pearsonr(prediction, y).statistic, abs=1e-4)
    assert metrics["val/spearman"].item() == pytest.approx(spearmanr(prediction, y).statistic, abs=1e-4)


def test_regressor_with_a_predicted_variance(fit):
    x = torch.randn(64, 8)
    network = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.2), nn.Linear(16, 2))
    module = Regressor(network, rdrop_distance=Gaussian(log_variance=True))
    loader = DataLoader(TensorDataset(x, x[:, 0]), batch_size=16)
    module.val_dataloader = lambda: loader
    metrics = fit(module, loader).callback_metrics
    assert {"train/nll", "train/kl", "val/nll", "val/mae"} <= set(metrics)
    torch.testing.assert_close(metrics["val/mae"], F.l1_loss(module.eval()(x)[:, 0], x[:, 0]))


def test_multilabel(fit):
    x = torch.randn(64, 8)
    y = (x[:, :4] > 0).float()
    network = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 4))
    module = MultilabelClassifier(network, 4, learning_rate=1e-2)
    loader = DataLoader(TensorDataset(x, y), batch_size=16)
    module.val_dataloader = lambda: loader
    metrics = fit(module, loader, max_epochs=10).callback_metrics
    probabilities = module.eval().predict_step(x, 0)
    torch.testing.assert_close(metrics["val/bce"], F.binary_cross_entropy(probabilities, y))
    torch.testing.assert_close(metrics["val/accuracy"], ((probabilities > 0.5) == y.bool()).float().mean())
    assert metrics["val/accuracy"] > 0.8
    assert metrics["train/kl"] > 0


class PackedLSTM(nn.Module):
    """Reads sentences of different lengths as a PackedSequence, which cannot be doubled."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(8, 16, num_layers=2, dropout=0.3)
        self.head = nn.Linear(16, 3)

    def forward(self, packed):
        return self.head(self.lstm(packed)[1][0][-1])


def test_packed_sequences_under_separate_passes(fit):
    from lightning_rdrop.modules import Classifier

    packed = nn.utils.rnn.pack_sequence([torch.randn(n, 8) for n in (5, 3, 2)])
    batch = (packed, torch.tensor([0, 1, 2]))
    loader = DataLoader([batch] * 3, batch_size=None)
    metrics = fit(Classifier(PackedLSTM(), 3, rdrop_passes="separate"), loader).callback_metrics
    assert metrics["train/kl"] > 0
    with pytest.raises(TypeError, match=r"a PackedSequence, cannot be doubled.*rdrop_passes=\"separate\""):
        fit(Classifier(PackedLSTM(), 3), loader)


@pytest.fixture
def t5(folder):
    settings = transformers.T5Config(
        vocab_size=len(WORDS), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    return folder(transformers.T5ForConditionalGeneration(settings))


@pytest.mark.parametrize(("task", "model"), [(CausalLM, "gpt2"), (Seq2Seq, "bart"), (Seq2Seq, "t5")])
def test_a_fused_head_changes_nothing_but_memory(fit, task, model, request):
    folder, batch = request.getfixturevalue(model), texts(labels=task is Seq2Seq)
    settings = {"scores": []} if task is Seq2Seq else {}
    plain, fused = task(folder, **settings), task(folder, fused_head=True, **settings)
    if model == "bart":  # its bias stands beside the output layer
        for module in (plain, fused):
            module.network.final_logits_bias.copy_(torch.arange(len(WORDS)) / 10)
    terms = []
    for module in (plain, fused):
        torch.manual_seed(1)
        terms.append(module.rdrop_step(batch))
        terms[-1].loss.backward()
    assert terms[0].kl > 0
    assert terms[1].prediction is None
    for name in ("loss", "ce", "kl", "rows"):
        torch.testing.assert_close(getattr(terms[1], name), getattr(terms[0], name))
    gradients = [{name: value.grad for name, value in module.network.named_parameters()} for module in (plain, fused)]
    torch.testing.assert_close(gradients[1], gradients[0])
    inputs = fused.rdrop_unpack(batch)[0]
    torch.testing.assert_close(fused.eval().rdrop_predict(inputs), plain.eval().rdrop_predict(inputs))
    assert trained(fit, fused.train(), batch)["val/ce"] > 0


def test_a_fused_head_makes_no_logits(gpt2):
    module = CausalLM(gpt2, fused_head=True)
    module.network.lm_head.register_forward_hook(lambda *_: pytest.fail("made logits"))
    assert module.rdrop_step(texts(labels=False)).loss > 0


def test_a_head_that_is_more_than_linear_is_not_fused(folder):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    settings = transformers.Gemma2Config(
        num_attention_heads=2, num_key_value_heads=1, final_logit_softcapping=0.01, **sizes, **SIZES
    )
    capped = folder(transformers.Gemma2ForCausalLM(settings))
    with pytest.raises(ValueError, match="Gemma2ForCausalLM changes them further"):
        CausalLM(capped, fused_head=True)
    assert CausalLM(capped).rdrop_head() is None
