"""CTC, against torch's own loss, sums over all alignments, and two networks that learn by it."""

import itertools

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_rdrop import CTC, RDropLoss, RDropMixin, symmetric_kl

FRAMES = torch.tensor([7, 5, 3, 6])
TOKENS = torch.tensor([[1, 2, 2, 3], [4, 1, -100, -100], [3, -100, -100, -100], [-100] * 4])
LENGTHS = torch.tensor([4, 2, 1, 0])


def numbers(views=2):
    return torch.randn(views, 4, 7, 5, dtype=torch.float64, requires_grad=True)


def torchs(logits, zero_infinity=False, frames=FRAMES):
    log_probs = logits.log_softmax(-1).transpose(0, 1)
    return F.ctc_loss(log_probs, TOKENS.clamp(min=0), frames, LENGTHS, zero_infinity=zero_infinity)


@pytest.mark.parametrize("views", [1, 2, 3])
@pytest.mark.parametrize("target", [(TOKENS, LENGTHS), (TOKENS.int(), LENGTHS.int()), TOKENS])
def test_the_loss_written_out(views, target):
    logits = numbers(views)
    terms = RDropLoss(CTC())((logits, FRAMES.expand(views, -1)), target, 2.0)
    ce = torch.stack([torchs(view) for view in logits]).mean()
    counted = torch.arange(7) < FRAMES[:, None]
    pairs = [symmetric_kl(logits[j], logits[k])[counted].mean() for k in range(views) for j in range(k)]
    kl = sum(pairs) / 2 / max(1, len(pairs)) + 0 * ce
    torch.testing.assert_close((terms.ce, terms.kl, terms.loss), (ce, kl, ce + 2.0 * kl))
    found, wanted = (torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (terms.loss, ce + 2.0 * kl))
    torch.testing.assert_close(found, wanted)
    assert terms.rows == 4
    assert terms.kl_rows is None if views == 1 else terms.kl_rows == 21


def test_the_first_term_is_minus_the_logarithm_of_all_alignments():
    probs = torch.rand(1, 4, 3, dtype=torch.float64).softmax(-1)

    def collapsed(path):
        return [token for token, _ in itertools.groupby(path) if token != 2]

    paths = [path for path in itertools.product(range(3), repeat=4) if collapsed(path) == [0, 0]]
    total = sum(probs[0, range(4), path].prod() for path in paths)
    found = CTC(blank=2).to_target((probs.log(), torch.tensor([4])), torch.tensor([[0, 0]])).mean
    torch.testing.assert_close(found, -total.log() / 2)


def test_gradients():
    logits = numbers()
    distance = CTC()
    assert torch.autograd.gradcheck(lambda x: distance.to_target((x[0], FRAMES), TOKENS).mean, logits)
    assert torch.autograd.gradcheck(lambda x: distance.between((x[0], FRAMES), (x[1], FRAMES)).mean, logits)
    assert torch.autograd.gradcheck(lambda x: distance.directed((x[0], FRAMES), (x[1], FRAMES)).mean, logits)


def test_the_consistency_of_cr_ctc():
    """Its L_CR is 1/2 sum over frames of KL both ways with a stopped gradient: the same value, times T / 2."""
    logits = numbers().detach()[:, :1].requires_grad_()
    p, q = logits[:, 0].log_softmax(-1)
    published = (F.kl_div(p, q.detach(), reduction="sum", log_target=True)) / 2
    published = published + F.kl_div(q, p.detach(), reduction="sum", log_target=True) / 2
    kl = RDropLoss(CTC()).consistency(logits, 1.0).kl
    torch.testing.assert_close(2 * 7 * kl, published)
    assert not torch.allclose(*(torch.autograd.grad(term, logits)[0] for term in (2 * 7 * kl, published)))


@pytest.mark.parametrize("junk", [torch.inf, torch.nan])
def test_padding_is_not_looked_at(junk):
    logits = numbers().detach()
    logits[:, torch.arange(7) >= FRAMES[:, None]] = junk
    logits.requires_grad_()
    terms = RDropLoss(CTC())((logits, FRAMES.expand(2, -1)), TOKENS, 2.0)
    clean = logits.detach().nan_to_num(0, 0).requires_grad_()
    wanted = RDropLoss(CTC())((clean, FRAMES.expand(2, -1)), TOKENS, 2.0)
    torch.testing.assert_close(terms.loss, wanted.loss)
    torch.testing.assert_close(*(torch.autograd.grad(t.loss, x)[0] for t, x in ((terms, logits), (wanted, clean))))


def test_logits_alone_count_in_all_their_frames():
    logits = numbers()
    whole = torch.full((2, 4), 7)
    alone, pair = RDropLoss(CTC())(logits, TOKENS, 1.0), RDropLoss(CTC())((logits, whole), TOKENS, 1.0)
    assert (alone.loss, alone.kl_rows) == (pair.loss, pair.kl_rows) == (pair.loss, 28)


def test_half_precision_is_computed_in_float32():
    logits = numbers().detach().bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        terms = RDropLoss(CTC())((logits, FRAMES.expand(2, -1)), TOKENS, 1.0)
    exact = RDropLoss(CTC())((logits.double(), FRAMES.expand(2, -1)), TOKENS, 1.0)
    assert terms.loss.dtype == torch.float32
    torch.testing.assert_close(terms.loss.double(), exact.loss, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("frames", "tokens", "lengths", "message"),
    [
        (FRAMES, TOKENS.where(TOKENS != 3, 5), LENGTHS, "Example 0 .* not one of the 5 classes, 0 to 4"),
        (FRAMES, TOKENS.where(TOKENS != 4, 0), LENGTHS, "Example 1 .* is the blank, 0"),
        (FRAMES, TOKENS.where(TOKENS != 4, -100), None, "Example 1 .*Put padding after the tokens, as -100"),
        (FRAMES + 1, TOKENS, LENGTHS, "Example 0 .* has a length outside 0 to 7, the number of frames"),
        (FRAMES, TOKENS, LENGTHS + 1, "Example 0 .* has a target length outside 0 to 4"),
        (
            FRAMES.clamp(max=4),
            TOKENS,
            LENGTHS,
            r"Example 0 .*more tokens than frames, counting one more between two equal",
        ),
    ],
)
def test_what_is_impossible_is_named(frames, tokens, lengths, message):
    prediction, target = (numbers().detach()[0], frames), tokens if lengths is None else (tokens, lengths)
    distance = CTC()
    with pytest.raises(ValueError, match=message):
        distance.check(prediction, target)
    assert distance.has_invalid(prediction, target)
    assert distance.invalid_mask(prediction, target).sum() >= 1
    assert not distance.has_invalid((prediction[0], FRAMES), (TOKENS, LENGTHS))


def test_an_infinite_loss_may_count_as_zero():
    """Five frames are enough for [1, 2, 2, 3], four are not."""
    logits = numbers()
    frames = FRAMES.clone()
    frames[0] = 5
    CTC().check((logits[0], frames), TOKENS)
    assert CTC().to_target((logits[0], frames), TOKENS).mean.isfinite()
    frames[0] = 4
    assert CTC().to_target((logits[0], frames), TOKENS).mean.isinf()
    zero = CTC(zero_infinity=True)
    zero.check((logits[0], frames), TOKENS)
    assert not zero.has_invalid((logits[0], frames), TOKENS)
    found, wanted = zero.to_target((logits[0], frames), TOKENS).mean, torchs(logits[0], True, frames)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (found, wanted)))


@pytest.mark.parametrize(
    ("prediction", "target", "error", "message"),
    [
        (
            (torch.zeros(4, 7, 5), FRAMES.float()),
            TOKENS,
            TypeError,
            "lengths of the prediction must be .* torch.float32",
        ),
        ((torch.zeros(4, 7, 5), [7, 5, 3, 6]), TOKENS, TypeError, "lengths of the prediction must be .* got list"),
        ((torch.zeros(4, 7, 5), FRAMES[:2]), TOKENS, ValueError, r"shape \(N,\) = \(4,\), got \(2,\)"),
        (torch.zeros(4, 5), TOKENS, ValueError, r"CTC takes logits \(N, T, C\).* got \(4, 5\)"),
        (torch.zeros(4, 7, 1), TOKENS, ValueError, "at least 2 classes"),
        ({"x": torch.zeros(4, 7, 5)}, TOKENS, TypeError, "The prediction is a dict, but CTC takes.*rdrop_predict"),
        (
            torch.zeros(4, 7, 5),
            TOKENS[:2],
            ValueError,
            r"tokens \(N, S\), integers, for the 4 examples .* got \(2, 4\)",
        ),
        (torch.zeros(4, 7, 5), TOKENS.flatten(), ValueError, "got .16,., torch.int64"),
        (torch.zeros(4, 7, 5), [[1], [2]], TypeError, "The target is a list.*rdrop_unpack"),
    ],
)
def test_what_has_another_form_is_refused(prediction, target, error, message):
    with pytest.raises(error, match=message):
        CTC().to_target(prediction, target)


@pytest.mark.parametrize("blank", [-1, 0.0, True])
def test_a_blank_is_a_class(blank):
    with pytest.raises(ValueError, match="blank must be an int >= 0, the index of a class"):
        CTC(blank)
    with pytest.raises(ValueError, match="including the blank, 5"):
        CTC(5).to_target(torch.zeros(4, 7, 5), TOKENS)


def test_a_softmax_is_noticed():
    assert "already a softmax: its rows sum to 1. CTC takes" in CTC().prediction_warning(
        (numbers()[0].softmax(-1), FRAMES)
    )
    assert CTC().prediction_warning((numbers()[0], FRAMES)) is None


class Recurrent(RDropMixin, pl.LightningModule):
    """A bidirectional LSTM over packed sequences, for lengths that are doubled with their inputs."""

    def __init__(self, **kwargs):
        super().__init__(rdrop_distance=CTC(), rdrop_alpha=1.0, **kwargs)
        self.network = nn.LSTM(4, 16, batch_first=True, bidirectional=True)
        self.dropout, self.head = nn.Dropout(0.2), nn.Linear(32, 5)
        self.seen = []

    def forward(self, frames, lengths):
        packed = nn.utils.rnn.pack_padded_sequence(frames, lengths.cpu(), batch_first=True, enforce_sorted=False)
        hidden, _ = nn.utils.rnn.pad_packed_sequence(self.network(packed)[0], batch_first=True)
        self.seen.append(lengths)
        return self.head(self.dropout(hidden)), lengths

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.03)


def spoken():
    """Each token is three frames long, and there is one frame of silence between two of them."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(4):
        tokens = torch.randint(1, 5, (8, 3), generator=generator)
        lengths = torch.randint(1, 4, (8,), generator=generator)
        frames = F.one_hot(tokens - 1, 4).float().unsqueeze(2) * torch.tensor([1.0, 1, 1, 0]).view(1, 1, 4, 1)
        tokens = tokens.where(torch.arange(3) < lengths[:, None], -100)
        frames = frames.flatten(1, 2) + 0.1 * torch.randn(8, 12, 4, generator=generator)
        batches.append({"frames": frames[:, : 4 * lengths.max()], "lengths": 4 * lengths, "labels": tokens})
    return batches


class Losses(pl.Callback):
    def __init__(self):
        self.steps = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.steps.append(float(outputs["ce"]))


@pytest.mark.parametrize("passes", ["joint", "separate"])
def test_a_bidirectional_lstm_learns(fit, passes):
    losses, module = Losses(), Recurrent(rdrop_passes=passes)
    trainer = fit(module, DataLoader(spoken(), batch_size=None), [losses], max_epochs=12)
    assert sum(losses.steps[-4:]) < 0.3 * sum(losses.steps[:4])
    assert trainer.callback_metrics["train/kl"] > 0
    batch = spoken()[0]
    module.seen.clear()
    terms = module.rdrop_step(batch)
    assert all(seen.tolist() == batch["lengths"].tolist() * (2 if passes == "joint" else 1) for seen in module.seen)
    assert terms.kl_rows == batch["lengths"].sum()
    assert terms.prediction[1].tolist() == batch["lengths"].tolist()


def test_a_later_example_without_an_alignment_is_found(fit):
    batches = spoken()
    batches[1]["lengths"] = batches[1]["lengths"].clamp(max=2)
    batches[1]["frames"] = batches[1]["frames"][:, :2]
    with pytest.raises(ValueError, match=r"target of batch 1 .* invalid.*more tokens than frames"):
        fit(Recurrent(), DataLoader(batches, batch_size=None), log_every_n_steps=1)


def test_wav2vec2_learns(fit):
    """Its own loss, the sum over the batch, is what the first term is made of; its lengths come from the mask."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Wav2Vec2Config(
        vocab_size=5, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        conv_dim=(16, 16), conv_kernel=(10, 5), conv_stride=(5, 4), num_feat_extract_layers=2, layerdrop=0.0,
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, mask_time_prob=0.0, pad_token_id=0,
        feat_extract_norm="layer",
    )  # fmt: skip

    class Speech(RDropMixin, pl.LightningModule):
        def __init__(self):
            super().__init__(rdrop_distance=CTC(blank=config.pad_token_id), rdrop_alpha=0.5)
            self.network = transformers.Wav2Vec2ForCTC(config)

        def rdrop_predict(self, inputs):
            lengths = self.network._get_feat_extract_output_lengths(inputs["attention_mask"].sum(-1))
            return self.network(**inputs).logits, lengths

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=3e-3)

    generator = torch.Generator().manual_seed(0)
    tokens = torch.tensor([[1, 2, 3], [4, 2, -100], [3, 1, 4], [2, -100, -100]])
    tones = torch.sin(torch.arange(100) * torch.tensor([0.1, 0.3, 0.6, 1.2])[(tokens - 1).clamp(min=0), None])
    batch = {
        "input_values": tones.flatten(1) + 0.05 * torch.randn(4, 300, generator=generator),
        "attention_mask": (tokens >= 0).long().repeat_interleave(100, 1),
        "labels": tokens,
    }
    losses, module = Losses(), Speech()
    fit(module, DataLoader([batch] * 40, batch_size=None), [losses])
    assert losses.steps[-1] < 0.7 * losses.steps[0]
    module.network.eval()
    with torch.no_grad():
        output = module.network(**batch)  # config.ctc_loss_reduction is "sum"
        prediction = module.rdrop_predict({name: batch[name] for name in ("input_values", "attention_mask")})
    lengths = (tokens >= 0).sum(1)
    rows, _ = CTC().to_target(prediction, tokens).rows
    torch.testing.assert_close((rows * lengths).sum(), output.loss)
