import pytest
import torch
from conftest import TOKEN_IDS, texts, trained_on
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_rdrop import RDropLoss
from lightning_rdrop.modules import Seq2Seq

transformers = pytest.importorskip("transformers")


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
    metrics = trained_on(fit, module, texts(), texts())
    assert metrics["train/kl"] > 0
    assert {"val/ce", "val/sacrebleu", "val/chrf", "val/rouge"} <= set(metrics)
    generated = module.eval().predict_step(texts(labels=False), 0)
    assert len(generated) == 4
    assert all(isinstance(text, str) and "<" not in text for text in generated)
    module.trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = Seq2Seq.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    torch.testing.assert_close(again.state_dict(), module.state_dict())


def test_a_frozen_encoder_runs_once(fit, bart):
    module = Seq2Seq(bart, [], frozen_below="model.decoder", rdrop_duplicate_at="auto")
    model = module.network.model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rows = {}
    for name in ("encoder", "decoder"):
        getattr(model, name).register_forward_hook(lambda part, x, y, name=name: rows.update({name: len(y[0])}))
    trainer = fit(module, DataLoader([texts()] * 3, batch_size=None))
    assert trainer.callback_metrics["train/kl"] > 0
    assert rows == {"encoder": 4, "decoder": 8}
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all(name.startswith("decoder.") for name in changed)


def test_seq2seq_scores_are_those_of_the_generated_text(fit, bart):
    module = Seq2Seq(bart, ["rouge"], max_new_tokens=6, num_beams=3)
    parrot = texts()
    given = {}

    def generate(**arguments):
        given.update(arguments)
        return parrot["labels"].clamp(min=0)  # word for word

    module.network.generate = generate
    metrics = trained_on(fit, module, parrot)
    assert metrics["val/rouge"] == pytest.approx(1.0)
    assert (given["max_new_tokens"], given["num_beams"]) == (6, 3)


@pytest.mark.parametrize("characters", [False, True])
def test_seq2seq_scores_by_hand(bart, characters):
    metrics = Seq2Seq(bart, ["sacrebleu", "chrf", "rouge"], characters=characters).val_metrics
    scores = metrics(["ab cdefg"], [["a b cdef" if characters else "ab cdef"]])
    orders = range(1, 7)  # n letters: 7 - n of 8 - n generated ones are right, and none is missing
    chrf = [(1 + 4) * p / (4 * p + 1) for p in [(7 - n) / (8 - n) for n in orders]]
    if characters:
        assert scores["val/sacrebleu"] == pytest.approx((6 / 7 * 5 / 6 * 4 / 5 * 3 / 4) ** 0.25)
        assert scores["val/rouge"] == pytest.approx(12 / 13)
        assert scores["val/chrf"] == pytest.approx(sum(chrf) / 6)
    else:
        assert scores["val/sacrebleu"] == 0  # no two words in a row
        assert scores["val/rouge"] == pytest.approx(1 / 2)
        assert scores["val/chrf"] == pytest.approx((sum(chrf) + 1 / 2 + 0) / 8)  # and words, one and two in a row


def test_seq2seq_without_scores_generates_nothing(fit, bart):
    module = Seq2Seq(bart, [])
    module.network.generate = lambda **given: pytest.fail("generated")
    assert trained_on(fit, module, texts())["val/ce"] > 0
    with pytest.raises(ValueError, match=r"'sacrebleu', 'chrf', 'rouge', got 'bleu'"):
        Seq2Seq(bart, ["rouge", "bleu"])


def test_seq2seq_of_a_model_that_shifts_in_its_forward_only(folder):
    settings = transformers.M2M100Config(
        d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=16, decoder_start_token_id=2, **TOKEN_IDS,
    )  # fmt: skip
    module, batch = Seq2Seq(folder(transformers.M2M100ForConditionalGeneration(settings))).eval(), texts()
    assert not hasattr(module.network, "prepare_decoder_input_ids_from_labels")  # as BART has it
    inputs, target = module.rdrop_unpack(batch)
    ours = module.rdrop_distance.to_target(module.rdrop_predict(inputs), target)
    torch.testing.assert_close(ours.mean, module.network(**batch).loss)


def test_seq2seq_without_labels_is_refused(bart):
    with pytest.raises(ValueError, match=r"input_ids, attention_mask but no labels.*decoder"):
        Seq2Seq(bart).rdrop_step(texts(labels=False))
