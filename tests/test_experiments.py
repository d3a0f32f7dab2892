"""The experiments on a slice of made-up data: each trains; what they find takes hours and is in examples/README.md."""

import gzip
import json
import shlex
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from conftest import WORDS

from lightning_rdrop.cli import RDropCLI
from lightning_rdrop.compare.command import parser
from lightning_rdrop.compare.plan import Plan

ROOT = Path(__file__).parents[1]
EXPERIMENTS = sorted((ROOT / "examples/experiments").glob("*.yaml"))
QUICK = [
    *("--trainer.max_steps=2", "--trainer.max_epochs=1", "--trainer.limit_val_batches=1"),
    *("--trainer.limit_test_batches=1", "--trainer.val_check_interval=1.0", "--trainer.check_val_every_n_epoch=1"),
    *("--trainer.log_every_n_steps=1", "--trainer.logger=CSVLogger", "--trainer.logger.save_dir=logs"),
]


def command(config):
    """The comparison in the first lines of a config."""
    comments = "".join(line.lstrip("# ") for line in config.read_text().splitlines(True) if line.startswith("#"))
    words = shlex.split(comments[comments.index("lightning-rdrop compare") :].replace("\\\n", " "))
    return parser().parse_args(words[2:])


def write_texts(folder, model):
    """The folders of ``data/``, with 40 rows in each table, and one network in the place of all."""
    columns = ("sentence", "sentence1", "sentence2", "german")
    for number, split in enumerate(("train", "val", "test", "unlabeled")):
        texts = [" ".join("abcdefghijklmnop"[int(digit, 16)] for digit in f"{number}{i:02x}") for i in range(40)]
        rows = [dict.fromkeys(columns, text) | {"english": text[::-1]} for text in texts]
        table = "\n".join(json.dumps(row | {"label": i % 2}) for i, row in enumerate(rows))
        for place in ("tnews/", "iflytek/", "eprstmt/", "glue/cola_", "glue/rte_", "translation/"):
            path = folder / f"data/{place}{split}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(table)
    for name in ("encoder", "minilm", "translation/model"):
        (folder / "data" / name).symlink_to(model)


def write_titles(encoder):
    """The experiment's model and tables, of tables as CSL has them."""
    from examples import from_scratch

    for split, count in (("dev", 140), ("test", 40)):
        texts = [" ".join("abcdefghij"[int(digit)] for digit in f"{i:03}") for i in range(count)]
        Path(f"{split}.tsv").write_text("\n".join(f"title\t{text}\t{text[::-1]}" for text in texts))
    from_scratch.titles(Path(), encoder)


def write_images(folder):
    """Files as Fashion-MNIST has them."""
    for part, count in (("train", 2_200), ("t10k", 40)):
        images = torch.randint(256, (count, 784), dtype=torch.uint8)
        for kind, header, values in (("images-idx3", 16, images), ("labels-idx1", 8, images[:, 0] % 10)):
            raw = gzip.compress(bytes(header) + values.numpy().tobytes(), compresslevel=1)
            (folder / f"{part}-{kind}-ubyte.gz").write_bytes(raw)


@pytest.fixture
def deep(folder):
    """Deep enough for those that freeze the lower layers."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 5, "num_attention_heads": 2, "intermediate_size": 16}
    return folder(transformers.BertModel(transformers.BertConfig(vocab_size=len(WORDS), **sizes)))


@pytest.mark.parametrize("config", EXPERIMENTS, ids=lambda path: path.stem)
def test_its_command_is_understood_and_its_last_variant_trains(config, tmp_path, monkeypatch, request):
    asked = command(config)
    assert asked.config == [str(config.relative_to(ROOT))]
    assert asked.out == f"examples/results/{config.stem}"
    monkeypatch.chdir(ROOT)
    plan = Plan.of(asked.config, asked.variant, asked.grid, asked.seed_to)

    monkeypatch.chdir(tmp_path)
    arguments = []
    if config.stem == "fashion":
        write_images(tmp_path)
        arguments = [f"--data.init_args.folder={tmp_path}", "--data.init_args.train_size=100"]
    elif config.stem == "multi30k":
        write_texts(tmp_path, request.getfixturevalue("bart"))
        arguments = ["--model.init_args.max_new_tokens=6"]
    elif config.stem == "titles":
        write_titles(request.getfixturevalue("deep"))
    elif config.stem != "diabetes":
        write_texts(tmp_path, request.getfixturevalue("deep"))
    last = yaml.safe_dump(plan.variants[[*plan.variants][-1]])
    RDropCLI(args=["fit", "--config", last, *QUICK, *arguments])
    logged = pd.read_csv("logs/lightning_logs/version_0/metrics.csv")
    assert (logged["train/kl"].dropna() > 0).all()
    assert logged.filter(regex="^test/").notna().any().all()
