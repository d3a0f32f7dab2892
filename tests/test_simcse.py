import pytest
import pytorch_lightning as pl
import torch
from conftest import train
from scipy.stats import spearmanr
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_rdrop import SimCSEMixin, Views
from lightning_rdrop.callbacks import AdaptiveAlpha, AlphaScheduler, ExactAccumulation, UnlabeledWeightScheduler
from lightning_rdrop.simcse import alignment, info_nce, pool, uniformity
from tests.networks import training_outputs


class Encoder(SimCSEMixin, pl.LightningModule):
    """Eight numbers in, four out."""

    def __init__(self, p=0.3, **kwargs):
        super().__init__(**kwargs)
        self.network = nn.Sequential(nn.Dropout(p), nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))

    def forward(self, x):
        return self.network(x)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def by_hand(first, second, temperature=0.05):
    """Equation 4 of the paper, term by term."""
    losses = []
    for i in range(len(first)):
        similarities = [first[i] @ other / (first[i].norm() * other.norm()) / temperature for other in second]
        losses.append(-similarities[i] + torch.stack(similarities).exp().sum().log())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("passes", ["joint", "separate"])
@pytest.mark.parametrize("temperature", [0.05, 0.5])
def test_the_loss_is_the_formula_on_the_captured_views(passes, temperature):
    module = Encoder(rdrop_passes=passes, simcse_temperature=temperature).double()
    seen = training_outputs(module)
    terms = module.rdrop_step(torch.randn(6, 8).double())
    assert len(seen) == (1 if passes == "joint" else 2)
    first, second = torch.cat(seen).unflatten(0, (2, 6))
    expected = by_hand(first, second, temperature)
    assert (
        abs(by_hand(second, first, temperature) / expected - 1) > 1e-4
    )  # so that the other direction would be noticed
    torch.testing.assert_close(terms.loss, expected)
    parameters = list(module.parameters())
    wanted = torch.autograd.grad(expected, parameters, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(terms.loss, parameters), wanted)
    torch.testing.assert_close(terms.prediction, first)
    assert terms.examples == 6


class Supervised(Encoder):
    """A batch is a list of anchors, positives and perhaps hard negatives."""

    def rdrop_unpack_unlabeled(self, batch):
        return Views(*batch), None


def supervised_by_hand(anchors, positives, negatives, temperature):
    """Equation 5 of the paper, term by term; every further batch of negatives has a further sum."""
    losses = []
    for i, anchor in enumerate(anchors):
        terms = [
            (F.cosine_similarity(anchor, other, dim=0) / temperature).exp()
            for other in torch.cat([positives, *negatives])
        ]
        losses.append(-(terms[i] / sum(terms)).log())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("passes", ["joint", "separate"])
@pytest.mark.parametrize("negatives", [0, 1, 2])
@pytest.mark.parametrize("p", [0.3, 0.0])
def test_positives_and_hard_negatives_that_come_with_the_batch(passes, negatives, p):
    module = Supervised(p, rdrop_passes=passes, simcse_temperature=0.5).double()
    batch, seen = [torch.randn(6, 8).double() for _ in range(2 + negatives)], training_outputs(module)
    terms = module.rdrop_step(batch)
    anchors, positives, *others = torch.cat(seen).unflatten(0, (2 + negatives, 6))
    expected = supervised_by_hand(anchors, positives, others, 0.5)
    torch.testing.assert_close(terms.loss, expected)
    parameters = list(module.parameters())
    wanted = torch.autograd.grad(expected, parameters, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(terms.loss, parameters), wanted)
    torch.testing.assert_close(terms.extra["alignment"], alignment(anchors, positives))
    torch.testing.assert_close(terms.extra["uniformity"], uniformity(anchors))
    assert torch.equal(terms.prediction, anchors)
    if p == 0.0:  # anchor, positive and negative stand in their places
        for found, x in zip((anchors, positives, *others), batch, strict=True):
            torch.testing.assert_close(found, module(x))


def test_positives_that_are_learned(fit):
    """Pairs that share their first half; what tells them apart is in the second."""
    x = torch.randn(64, 8)
    rows = [(row, torch.cat([row[:4], torch.randn(4)])) for row in x]
    first = fit(Supervised(p=0.0), DataLoader(rows, 16)).callback_metrics
    last = fit(Supervised(p=0.0), DataLoader(rows, 16), max_epochs=30).callback_metrics
    assert last["train/loss"] < 0.8 * first["train/loss"]


def test_alignment_and_uniformity_are_the_published_ones():
    x, y = F.normalize(torch.randn(7, 4).double(), dim=1), F.normalize(torch.randn(7, 4).double(), dim=1)
    torch.testing.assert_close(alignment(3 * x, 5 * y), (x - y).norm(p=2, dim=1).pow(2).mean())
    torch.testing.assert_close(uniformity(3 * x), torch.pdist(x, p=2).pow(2).mul(-2).exp().mean().log())


def test_half_precision_is_computed_in_float32():
    x = torch.randn(8, 64)
    close = x + 0.01 * torch.randn(8, 64)
    with torch.autocast("cpu", torch.bfloat16):
        half = info_nce(x.bfloat16(), close.bfloat16(), 0.5)
    torch.testing.assert_close(half, by_hand(x.bfloat16().float(), close.bfloat16().float(), 0.5))


class Noisy(Encoder):
    def __init__(self):
        super().__init__(rdrop_passes="separate")
        torch.manual_seed(7)
        self.network = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
        self.passes = 0

    def forward(self, x):
        self.passes += 1
        return self.network(x * (1 + 0.3 * torch.sin((10 + self.passes % 2) * x)))


def weights(module):
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


class Losses(pl.Callback):
    def __init__(self):
        self.losses = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item())


def trained(batch_size, **trainer):
    """The losses, and the weights in the end."""
    x = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))  # one batch an epoch: Lightning may shuffle
    module, record = Noisy(), Losses()
    train(module, DataLoader(x, batch_size), [record], max_epochs=2, **trainer)
    return record.losses, weights(module).tolist()


def of_a_rank():
    return trained(4, strategy="ddp", devices=2)


def test_two_ranks_are_the_joined_batch(pair):
    """The steps of SGD are equal, so the gradients are that DDP averages."""
    losses, joined = trained(8)
    (first, second), ranks = zip(*pair.run(of_a_rank), strict=True)
    torch.testing.assert_close((torch.tensor(first) + torch.tensor(second)) / 2, torch.tensor(losses))
    for rank in ranks:
        torch.testing.assert_close(torch.tensor(rank), torch.tensor(joined))
    assert (torch.tensor(joined) - weights(Noisy())).abs().max() > 1e-2


def test_it_learns_and_logs_what_it_should(fit):
    x, sizes = torch.randn(64, 8), []

    class Watched(Encoder):
        def log(self, name, value, *args, batch_size=None, **kwargs):
            sizes.append(batch_size)
            super().log(name, value, *args, batch_size=batch_size, **kwargs)

    module = Watched()
    first = fit(module, DataLoader(x, 16)).callback_metrics
    last = fit(module, DataLoader(x, 16), max_epochs=30).callback_metrics
    assert set(last) == {"train/loss", "train/alignment", "train/uniformity"}
    assert set(sizes) == {16}
    assert last["train/loss"] < 0.8 * first["train/loss"]


@pytest.mark.parametrize("batch", [torch.ones(3, 8), (torch.ones(3, 8),), (torch.ones(3, 8), torch.arange(3))])
def test_labels_may_be_there_or_not(batch):
    assert Encoder().rdrop_step(batch).examples == 3


def test_dead_dropout_is_noticed():
    with pytest.raises(ValueError, match=r"p = 0: network\.0"):
        Encoder(p=0.0).rdrop_step(torch.randn(4, 8))


def test_dropout_that_dies_later_is_noticed(fit):
    class Dies(Encoder):
        def rdrop_predict(self, inputs):
            return nn.functional.dropout(super().rdrop_predict(inputs), 0.3 if self.global_step < 20 else 0.0)

    with pytest.raises(ValueError, match="The views are identical"):
        fit(Dies(p=0.0), DataLoader(torch.randn(200, 8), batch_size=4), log_every_n_steps=10)


def test_a_batch_of_one_has_nothing_to_be_told_from(fit):
    with pytest.raises(ValueError, match="batch_size=1"):
        Encoder().rdrop_step(torch.randn(1, 8))
    with pytest.raises(ValueError, match="batch_size=1"):
        Supervised().rdrop_step([torch.randn(1, 8) for _ in range(2)])
    assert Supervised().rdrop_step([torch.randn(1, 8) for _ in range(3)]).loss > 0  # but from its hard negative
    assert fit(Encoder(), DataLoader(torch.randn(9, 8), 4)).callback_metrics["train/loss"] == 0  # the last batch


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Encoder(simcse_temperature=0), ValueError, "simcse_temperature must be > 0"),
        (lambda: Encoder(simcse_temperature=-1.0), ValueError, "simcse_temperature must be a finite number >= 0"),
        (lambda: Encoder(rdrop_alpha=4.0), TypeError, "rdrop_alpha=4.0 does not apply to Encoder.*simcse_temperature"),
        (lambda: Encoder(rdrop_views=3), TypeError, "rdrop_views=3 does not apply to Encoder.*two views"),
        (lambda: Encoder(rdrop_regularizers=[]), TypeError, "rdrop_regularizers=.* does not apply to Encoder"),
        (lambda: Encoder(rdrop_alhpa=4.0), TypeError, "Did you mean rdrop_alpha"),
    ],
)
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_tokens_are_no_embedding():
    module = Encoder()
    module.network = nn.Dropout(0.3)
    with pytest.raises(ValueError, match=r"embeddings \(B, D\).*\(4, 5, 8\)"):
        module.rdrop_step(torch.randn(4, 5, 8))


def test_exact_accumulation_is_refused(fit):
    with pytest.raises(ValueError, match="The loss of SimCSE is not such a mean: its negatives"):
        fit(Encoder(), DataLoader(torch.randn(8, 8), 4), [ExactAccumulation()])


def test_padding_has_no_part_in_a_mean():
    states = [torch.randn(2, 3, 5) for _ in range(4)]
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    for pooling, tokens in (("mean", states[3]), ("first-last-average", (states[1] + states[3]) / 2)):
        expected = torch.stack([tokens[0].mean(0), tokens[1, :2].mean(0)])
        torch.testing.assert_close(pool(states, mask, pooling), expected)
    torch.testing.assert_close(pool(states, mask, "cls"), states[3][:, 0])


LETTERS = ["<pad>", "<unk>", *"abcdefghijklmnop"]


@pytest.fixture
def folder(tmp_path):
    """A tiny BERT, a tokenizer of single letters, and a table of pairs."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    letters = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(LETTERS)}, unk_token="<unk>"))
    letters.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=letters, pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(tmp_path / "model")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    transformers.BertModel(transformers.BertConfig(vocab_size=len(LETTERS), **sizes)).save_pretrained(
        tmp_path / "model"
    )
    rows = ["a b c\ta b\t5", "a b\td e f\t1", "g h\tg h i\t4", "k\tp o\t0", "m n o\tm n p\t3"]
    (tmp_path / "pairs.tsv").write_text("\n".join(["sentence\tother\tscore", *rows]))
    return tmp_path


@pytest.mark.parametrize("pooling", ["cls", "mean", "first-last-average"])
def test_a_sentence_encoder_is_scored_by_spearman(fit, folder, pooling):
    from lightning_rdrop.data import SentencePairDataModule
    from lightning_rdrop.modules import SentenceEncoder

    table = str(folder / "pairs.tsv")
    data = SentencePairDataModule(
        str(folder / "model"), table, table, table, table, pair="other", label="score", batch_size=2
    )
    module = SentenceEncoder(str(folder / "model"), pooling=pooling)
    trainer = fit(module, data)
    assert trainer.num_training_batches == 5  # ten sentences, of both columns
    assert {"train/loss", "train/alignment", "train/uniformity", "val/spearman"} <= set(trainer.callback_metrics)

    embeddings = torch.cat(trainer.predict(module, data))  # of the first column
    module.eval()
    cosines = []
    for number, row in enumerate(data.rows("val")):
        first, second = (module.rdrop_predict(data.encode([row[side]], None)) for side in ("sentence", "other"))
        torch.testing.assert_close(embeddings[number], first[0], rtol=1e-4, atol=1e-5)
        cosines.append(F.cosine_similarity(first, second).item())
    (tested,) = trainer.test(module, data, verbose=False)
    assert tested["test/spearman"] == pytest.approx(spearmanr(cosines, [5, 1, 4, 0, 3]).statistic, abs=1e-5)


def encoder_of_a_rank(folder):
    from lightning_rdrop.data import SentencePairDataModule
    from lightning_rdrop.modules import SentenceEncoder

    data = SentencePairDataModule(str(folder / "model"), str(folder / "pairs.tsv"), pair="other", label="score")
    data.batch_size = 2
    train(SentenceEncoder(str(folder / "model")), data, strategy="ddp", devices=2)


def test_two_ranks_leave_no_parameter_without_a_gradient(pair, folder):
    pair.run(encoder_of_a_rank, folder)


def test_a_pooling_that_is_none(folder):
    from lightning_rdrop.modules import SentenceEncoder

    with pytest.raises(ValueError, match="pooling must be one of 'cls', 'mean', 'first-last-average', got 'max'"):
        SentenceEncoder(str(folder / "model"), pooling="max")


def test_a_positive_is_not_taken_for_a_label():
    x = torch.randn(6, 8)
    with pytest.raises(ValueError, match=r"an anchor and its positive.*return Views\(anchor, positive\)"):
        Encoder().rdrop_step((x, torch.randn(6, 8)))
    Encoder().rdrop_step((x, torch.arange(6)))


@pytest.mark.parametrize("callback", [AlphaScheduler(), AdaptiveAlpha(0.1, 100), UnlabeledWeightScheduler()])
def test_callbacks_that_set_what_the_loss_has_not_are_refused(fit, callback):
    with pytest.raises(TypeError, match=f"^{type(callback).__name__} sets {callback.attribute}.*loss of SimCSE"):
        fit(Encoder(), DataLoader(torch.randn(8, 8), 4), [callback])
