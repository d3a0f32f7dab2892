import warnings
from functools import partial

import pytest
import torch

try:  # before Lightning, which imports it where it is there
    import torchvision  # noqa: F401
except ModuleNotFoundError:
    pass
except RuntimeError:  # PyPI's, beside a CPU build of torch: its compiled operators do not load, and nobody calls them
    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import pytorch_lightning as pl
from ranks import Pair
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_rdrop import RDropMixin

torch.set_num_threads(1)  # the networks are tiny, and the workers of `pytest -n` share the cores


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _reproducible():
    torch.manual_seed(0)


def train(module, loader, callbacks=(), lightning=pl, resume=None, **trainer):
    """Train a module on the CPU, quietly; returns the Trainer."""
    trainer = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    } | trainer
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The '.*_dataloader' does not have many workers")
        warnings.filterwarnings("ignore", ".*isinstance.treespec, LeafSpec.*")
        trainer = lightning.Trainer(callbacks=list(callbacks), **trainer)
        trainer.fit(module, loader, ckpt_path=resume)
    return trainer


@pytest.fixture
def fit(tmp_path):
    """Train a module on the CPU, quietly; returns the Trainer."""
    return partial(train, default_root_dir=tmp_path)


@pytest.fixture(scope="session")
def pair():
    """Two ranks, each of which runs a function, and answers with what it returns."""
    if not torch.distributed.is_gloo_available():
        pytest.skip("needs gloo")
    pair = Pair()
    yield pair
    pair.stop()


class Small(RDropMixin, pl.LightningModule):
    """Eight numbers in, three classes out."""

    def __init__(self, p: float = 0.3, **kwargs):
        super().__init__(**kwargs)
        self.save_hyperparameters()
        self.network = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(p), nn.Linear(16, 3))

    def forward(self, x):
        return self.network(x)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Two(Small):
    """Manual optimization, with an optimizer for each layer."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.automatic_optimization = False

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), 0.1) for part in (self.network[0], self.network[3])]

    def training_step(self, batch, batch_idx):
        terms = self.rdrop_step(batch)
        self.rdrop_log(terms)
        self.manual_backward(terms.loss)
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()


class Net(RDropMixin, pl.LightningModule):
    """Whatever network, called with whatever inputs."""

    def __init__(self, network, **kwargs):
        super().__init__(**kwargs)
        self.network = network

    def forward(self, *args, **kwargs):
        return self.network(*args, **kwargs)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def sequential(*dropouts):
    """Linear layers with a dropout of the given probability behind each."""
    return nn.Sequential(
        *(part for p in dropouts for part in (nn.Linear(8, 8), nn.Tanh(), nn.Dropout(p))), nn.Linear(8, 3)
    )


def ragged(classes, features):
    """Eight sentences, of one to eight tokens that count."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length in (8, 1, 3, 2, 7, 1, 5, 4):
        target = torch.randint(classes, (8,), generator=generator)
        target[length:] = -100
        rows.append((torch.randn(8, features, generator=generator), target))
    return rows


@pytest.fixture
def small():
    return Small


@pytest.fixture
def rows():
    """Thirty examples in batches of 4 (seven full ones and one of two)."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(30, 8, generator=generator)
    return DataLoader(TensorDataset(x, x[:, :3].argmax(-1)), batch_size=4)


WORDS = ["<pad>", "<s>", "</s>", "<unk>", *"abcdefghijklmnop"]
TOKEN_IDS = {"vocab_size": len(WORDS), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


@pytest.fixture
def folder(tmp_path):
    """Write a tiny model, and a tokenizer of single letters."""

    transformers = pytest.importorskip("transformers")

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
    transformers = pytest.importorskip("transformers")
    settings = transformers.BartConfig(
        d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=16, decoder_start_token_id=2, **TOKEN_IDS,
    )  # fmt: skip
    return folder(transformers.BartForConditionalGeneration(settings))


@pytest.fixture
def gpt2(folder):
    transformers = pytest.importorskip("transformers")
    settings = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=16, **TOKEN_IDS)
    return folder(transformers.GPT2LMHeadModel(settings))


@pytest.fixture
def bert(folder):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return folder(transformers.BertModel(transformers.BertConfig(vocab_size=len(WORDS), **sizes)))


@pytest.fixture
def t5(folder):
    transformers = pytest.importorskip("transformers")
    settings = transformers.T5Config(
        vocab_size=len(WORDS), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    return folder(transformers.T5ForConditionalGeneration(settings))


def texts(labels=True):
    """A batch of four padded texts of the tiny models, with target texts as labels."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, 20, (4, 7), generator=generator)
    mask = (torch.arange(7) < torch.tensor([[7], [5], [3], [6]])).long()
    batch = {"input_ids": ids * mask, "attention_mask": mask}
    if labels:
        targets = torch.randint(4, 20, (4, 5), generator=generator)
        targets[1:3, 3:] = -100
        batch["labels"] = targets
    return batch


def trained_on(fit, module, *batches):
    """The metrics after an epoch of training and validation on these batches."""
    loader = DataLoader([*batches], batch_size=None)
    module.val_dataloader = lambda: loader
    return fit(module, loader, num_sanity_val_steps=0).callback_metrics
