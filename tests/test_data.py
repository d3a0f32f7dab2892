import json
import re
import warnings

import pytest
import torch

from lightning_rdrop.data import (
    MultilabelTextDataModule,
    TextDataModule,
    TextRegressionDataModule,
    TextToTextDataModule,
    TokenDataModule,
    read_table,
)


class Words(TextDataModule):
    """Reads words of one table as their lengths."""

    def __init__(self, **kwargs):
        super().__init__("words", **kwargs)

    def encode(self, texts, pairs):
        lengths = [[len(word) for word in text.split()] for text in texts]
        width = max(map(len, lengths))
        return {"input_ids": torch.tensor([row + [0] * (width - len(row)) for row in lengths])}


@pytest.fixture
def table(tmp_path):
    def write(name, rows):
        text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        (tmp_path / name).write_text(text, encoding="utf8")
        return str(tmp_path / name)

    return write


def test_json_lines_split_at_newlines_only(table):
    rows = [{"sentence": "one\u2028line", "label": "a"}, {"sentence": "two", "label": "b"}]
    assert read_table(table("train.json", rows)) == rows


def test_tsv_takes_quotes_as_they_are_and_csv_does_not(tmp_path):
    (tmp_path / "t.tsv").write_text('sentence\tlabel\n"half a quote\t1\n', encoding="utf8")
    (tmp_path / "t.csv").write_text('sentence,label\n"a, b",1\n', encoding="utf8")
    assert read_table(tmp_path / "t.tsv") == [{"sentence": '"half a quote', "label": "1"}]
    assert read_table(tmp_path / "t.csv") == [{"sentence": "a, b", "label": "1"}]


def test_bad_tables(tmp_path):
    (tmp_path / "t.json").write_text('{"sentence": "a"}\nnonsense\n')
    with pytest.raises(ValueError, match="line 2: not a JSON object: 'nonsense'"):
        read_table(tmp_path / "t.json")
    with pytest.raises(ValueError, match=r"\.jsonl or \.parquet file, .* not \.xlsx"):
        read_table(tmp_path / "t.xlsx")


def test_batches(table):
    rows = [{"sentence": "a bb ccc", "label": 10}, {"sentence": "dd", "label": 9}]
    data = Words(train=table("train.json", rows), batch_size=2)
    data.setup("fit")
    assert data.labels == ["9", "10"]  # sorted as the numbers that they are
    (batch,) = data.train_dataloader()
    order = batch["labels"].argsort(descending=True)
    assert batch["labels"][order].tolist() == [1, 0]
    assert batch["input_ids"][order].tolist() == [[1, 2, 3], [2, 0, 0]]
    assert data.val_dataloader() == []


@pytest.mark.parametrize("unlabeled", [False, True])
def test_training_batches_of_about_one_length(table, unlabeled):
    rows = [{"sentence": "a " * (1 + n % 8), "second": "b " * (1 + n % 8), "label": n % 2} for n in range(512)]
    file = table("train.json", rows)
    others = {"unlabeled": file, "unlabeled_batch_size": 4} if unlabeled else {}
    data = Words(train=file, val=file, pair="second", batch_size=8, group_by_length=True, **others)
    data.setup("fit")
    loaders = data.train_dataloader() if unlabeled else {"labeled": data.train_dataloader()}
    for loader in loaders.values():
        loader.sampler.set_epoch(0)
        first = [batch["input_ids"] for batch in loader]
        loader.sampler.set_epoch(1)
        second = [batch["input_ids"] for batch in loader]
        for epoch in (first, second):
            padded = sum(int((ids == 0).sum()) for ids in epoch)
            assert padded < 0.1 * sum(ids.numel() for ids in epoch)  # at random it is 0.43
        widths = [[ids.shape[1] for ids in epoch] for epoch in (first, second)]
        assert widths[0] != widths[1]
    assert [ids.shape[1] for ids in (batch["input_ids"] for batch in data.val_dataloader())] == [8] * 64


def test_prediction_needs_no_labels(table):
    data = Words(predict=table("new.json", [{"sentence": "a bb"}]))
    data.setup("predict")
    (batch,) = data.predict_dataloader()
    assert set(batch) == {"input_ids"}


def test_labels_come_from_the_training_table(table):
    train = table("train.json", [{"sentence": "a", "label": "x"}, {"sentence": "b", "label": "y"}])
    test = table("test.json", [{"sentence": "c", "label": "y"}])
    data = Words(train=train, test=test)
    data.setup("test")
    (batch,) = data.test_dataloader()
    assert batch["labels"].tolist() == [1]


def test_what_is_missing_is_named(table):
    rows = [{"sentence": "a", "label": "x"}, {"sentence": "b", "label": "z"}]
    with pytest.raises(ValueError, match=r"no train table\. Pass train="):
        Words().setup("fit")
    with pytest.raises(
        ValueError, match=r"t\.json: no column 'review', only 'sentence', 'label'\. Name .* text=\.\.\."
    ):
        Words(train=table("t.json", rows), text="review").setup("fit")
    data = Words(train=table("t.json", rows), labels=["x", "y"])
    with pytest.raises(ValueError, match=r"t\.json, line 2: the label 'z' is not one of the 2 classes \(x, y\)"):
        data.setup("fit")


@pytest.mark.parametrize(
    ("labels", "given", "warned"),
    [
        (
            ["0.37", "1.2", "-3", "0.5"],
            None,
            "4 different labels, numbers with fractions such as .*SequenceRegressor",
        ),
        (["4.5", "5", "5", "4.5"], ["4.5", "5"], None),
        (["1", "2.0", "3", "1"], None, None),
        (["1.5", "none", "nan", "1.5"], None, None),
        (["nan", "0.5", "inf", "nan"], None, None),
    ],
)
def test_fractions_are_perhaps_no_classes(table, labels, given, warned):
    data = Words(train=table("t.json", [{"sentence": "a", "label": label} for label in labels]), labels=given)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        data.setup("fit")
    assert len(said) == bool(warned)
    assert not warned or re.search(warned, str(said[0].message))


def test_a_tokenizer_that_cannot_be_loaded(table):
    pytest.importorskip("transformers")
    data = TextDataModule("./nope", table("train.json", [{"sentence": "a", "label": name} for name in "xy"]))
    data.setup("fit")
    with pytest.raises(OSError, match=r"tokenizer='\./nope' cannot be loaded: .+"):
        next(iter(data.train_dataloader()))


def test_a_hugging_face_tokenizer_from_a_folder(table, tmp_path):
    transformers = pytest.importorskip("transformers")
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "好", "吃"]))
    transformers.BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "tokenizer")
    rows = [{"first": "好吃", "second": "好", "label": 0}, {"first": "好", "second": "吃", "label": 1}]
    data = TextDataModule(
        str(tmp_path / "tokenizer"), table("train.json", rows), text="first", pair="second", batch_size=2
    )
    data.setup("fit")
    (batch,) = data.train_dataloader()
    assert batch["input_ids"].shape == (2, 6)  # [CLS] 好 吃 [SEP] 好 [SEP]
    assert batch["attention_mask"].sum() == 6 + 5
    assert batch["token_type_ids"].sum() == 2 + 2


@pytest.fixture
def letters(tmp_path):
    """A tokenizer whose words fall into letters."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<pad>", "<unk>", *"abcdef"])}, "<unk>"))
    split = [pre_tokenizers.Whitespace(), pre_tokenizers.Split("", "isolated")]
    core.pre_tokenizer = pre_tokenizers.Sequence(split)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", unk_token="<unk>")
    tokenizer.save_pretrained(tmp_path / "letters")
    return str(tmp_path / "letters")


def test_blank_labels_are_no_hindrance_to_prediction(table, letters):
    rows = [{"sentence": "ab", "label": ""}]
    for kind in (TextDataModule, TextRegressionDataModule, TextToTextDataModule):
        data = kind(letters, predict=table("new.json", rows), labels=["x", "y"])
        data.setup("predict")
        (batch,) = data.predict_dataloader()
        assert batch["input_ids"].tolist() == [[2, 3]]
        assert "labels" not in batch


def test_a_tokenizer_without_padding_pads_with_its_end(table, letters):
    transformers = pytest.importorskip("transformers")
    core = transformers.AutoTokenizer.from_pretrained(letters).backend_tokenizer
    transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="f").save_pretrained(letters)
    data = TextDataModule(letters, val=table("val.json", [{"sentence": "ab"}, {"sentence": "c"}]), label=None)
    data.setup("validate")
    (batch,) = data.val_dataloader()
    assert batch["input_ids"].tolist() == [[2, 3], [4, 7]]
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]


def test_several_classes_as_labels(table, letters):
    rows = [{"sentence": "ab", "label": ["z", "x"]}, {"sentence": "c", "label": []}, {"sentence": "c", "label": ["y"]}]
    data = MultilabelTextDataModule(letters, table("train.json", rows), table("val.json", rows))
    data.setup("fit")
    assert data.labels == ["x", "y", "z"]
    (batch,) = data.val_dataloader()
    assert batch["labels"].tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 0]]
    wrong = MultilabelTextDataModule(letters, table("t.json", [{"sentence": "a", "label": "xyz"}]))
    with pytest.raises(ValueError, match=r"'label' must be a list of classes, got 'xyz'"):
        wrong.setup("fit")


def test_numbers_as_labels(table, letters):
    rows = [{"sentence": "ab", "label": "2.5"}, {"sentence": "c", "label": 1}]
    data = TextRegressionDataModule(letters, val=table("val.json", rows))
    data.setup("validate")
    (batch,) = data.val_dataloader()
    assert batch["labels"].tolist() == [2.5, 1.0]


def test_texts_as_labels(table, letters):
    rows = [{"sentence": "ab", "label": "fed"}, {"sentence": "c", "label": "a"}]
    data = TextToTextDataModule(letters, val=table("val.json", rows))
    data.setup("validate")
    (batch,) = data.val_dataloader()
    assert batch["input_ids"].tolist() == [[2, 3], [4, 0]]
    assert batch["labels"].tolist() == [[7, 6, 5], [2, -100, -100]]


def test_a_class_for_each_word(table, letters):
    rows = [{"words": ["ab", "c"], "tags": ["v", "n"]}, {"words": ["d"], "tags": ["n"]}]
    data = TokenDataModule(letters, table("train.json", rows), table("val.json", rows), text="words", label="tags")
    data.setup("fit")
    assert data.labels == ["n", "v"]
    (batch,) = data.val_dataloader()
    assert batch["input_ids"].tolist() == [[2, 3, 4], [5, 0, 0]]
    assert batch["labels"].tolist() == [[1, -100, 0], [0, -100, -100]]
    wrong = TokenDataModule(letters, table("t.json", [{"words": ["a"], "tags": []}]), text="words", label="tags")
    with pytest.raises(ValueError, match="1 words in 'words' but 0 classes in 'tags'"):
        wrong.setup("fit")


def test_text_alone(table, letters):
    data = TextDataModule(letters, table("train.json", [{"sentence": "abc"}]), label=None)
    data.setup("fit")
    (batch,) = data.train_dataloader()
    assert "labels" not in batch
