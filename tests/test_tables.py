"""Tables as people have them: damaged ones are refused in one line, all others are read."""

import json
import math

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

GOOD = "sentence,label\na,x\nb,y\n"
WORDS = {"text": "words", "label": "tags"}


def lines(*rows):
    return "\n".join(map(json.dumps, rows))


DAMAGED = {
    # name of the file, its contents, what is said
    "empty": ("t.csv", "", "t.csv: the file is empty."),
    "blank lines alone": ("t.jsonl", " \n\n", "t.jsonl: the file is empty."),
    "header only": ("t.csv", "sentence,label\n", "t.csv: the table has no rows."),
    "empty array": ("t.json", "[]", "t.json: the table has no rows."),
    "Latin-1": (
        "t.csv",
        GOOD.encode() + "caf\u00e9,x\n".encode("latin1"),
        "t.csv, line 4: the byte 0xe9 is not UTF-8. Save the file as UTF-8.",
    ),
    "UTF-16": ("t.csv", GOOD.encode("utf-16"), "t.csv: the file is UTF-16. Save it as UTF-8."),
    "NUL": (
        "t.csv",
        "sentence,label\na,x\nb\0,y\n",
        "t.csv, line 3: a NUL character, so this is not UTF-8 text. Save the file as UTF-8.",
    ),
    "one cell too many": (
        "t.csv",
        "sentence,label\ngood, really good,x\n",
        "t.csv, line 2: the header has 2 columns, but this row has 3. A text with a comma must be in double quotes.",
    ),
    "one cell too few": (
        "t.tsv",
        "sentence\tlabel\na\n",
        "t.tsv, line 2: the header has 2 columns, but this row has 1.",
    ),
    "a quote that does not end": (
        "t.csv",
        'sentence,label\na,x\n"b,y\nc,x\n',
        "t.csv, line 3: wrong quoting (unexpected end of data). Put a text with a quote in double quotes, and double "
        "the quote inside it.",
    ),
    "a quote that ends early": (
        "t.csv",
        'sentence,label\n"a "good" one",x\n',
        "t.csv, line 2: wrong quoting (',' expected after '\"'). Put a text with a quote in double quotes, and double "
        "the quote inside it.",
    ),
    "semicolons": (
        "t.csv",
        "sentence;label\na;x\n",
        "t.csv, line 1: the cells are separated by ';', but a .csv file needs ','.",
    ),
    "a column twice": (
        "t.csv",
        "sentence,label,label\na,x,x\n",
        "t.csv, line 1: the header has the column 'label' twice.",
    ),
    "another case": (
        "t.csv",
        "Sentence,Label\na,x\n",
        "t.csv: no column 'sentence', only 'Sentence', 'Label'. Did you mean 'Sentence'? Name the column with text=...",
    ),
    "space in the header": (
        "t.csv",
        "sentence, label\na,x\n",
        "t.csv: no column 'label', only 'sentence', ' label'. Did you mean ' label'? Name the column with label=...",
    ),
    "blank text": ("t.csv", "sentence,label\n\n\n  ,x\n", "t.csv, line 4: the column 'sentence' is blank."),
    "blank label": ("t.csv", "sentence,label\na,x\nb,\n", "t.csv, line 3: the column 'label' is blank."),
    "null label": (
        "t.jsonl",
        lines({"sentence": "a", "label": "x"}, {"sentence": "b", "label": None}),
        "t.jsonl, line 2: the column 'label' is blank.",
    ),
    "NaN label, as pandas writes it": (
        "t.json",
        '[{"sentence": "a", "label": "x"}, {"sentence": "b", "label": NaN}]',
        "t.json, row 2: the column 'label' is blank.",
    ),
    "a row without a label": (
        "t.jsonl",
        lines({"sentence": "a", "label": "x"}, {"sentence": "b"}),
        "t.jsonl, line 2: no column 'label', only 'sentence'.",
    ),
    "mixed labels": (
        "t.jsonl",
        lines({"sentence": "a", "label": 1}, {"sentence": "b", "label": "1"}),
        "t.jsonl, line 2: the label '1' has the type str, but an earlier one int. Write all labels as texts.",
    ),
    "a list as a label": (
        "t.jsonl",
        lines({"sentence": "a", "label": ["x"]}),
        "t.jsonl, line 1: a class must be a text or an integer, got ['x'] (list).",
    ),
    "a fraction as a label": (
        "t.jsonl",
        lines({"sentence": "a", "label": 0.5}),
        "t.jsonl, line 1: a class must be a text or an integer, got 0.5 (float).",
    ),
    "infinity as a label": (
        "t.json",
        '[{"sentence": "a", "label": -Infinity}]',
        "t.json, row 1: a class must be a text or an integer, got -inf (float).",
    ),
    "an empty object": (
        "t.json",
        "[{}]",
        "t.json: no column 'sentence', only an empty row. Name the column with text=...",
    ),
    "a number as a text": (
        "t.jsonl",
        lines({"sentence": 5, "label": "x"}),
        "t.jsonl, line 1: the column 'sentence' must be a text, got 5 (int).",
    ),
    "all labels the same": (
        "t.csv",
        "sentence,label\na,x\nb,x\n",
        "All labels of the train table are 'x', so there is nothing to learn.",
    ),
    "a bad line": (
        "t.jsonl",
        '{"sentence": "a", "label": "x"}\n{"sentence": "b", "label": x}\n',
        't.jsonl, line 2: not a JSON object: \'{"sentence": "b", "label": x}\' (Expecting value at column 28).',
    ),
    "a line that is no object": ("t.json", '{"sentence": "a"}\n[]\n', "t.json, line 2: not a JSON object: '[]'."),
    "an array of lists": ("t.json", '[["a", "x"]]', 't.json, row 1: not a JSON object: \'["a", "x"]\'.'),
    "an array that is cut off": (
        "t.json",
        '[{"sentence": "a", "label": "x"},\n',
        "t.json, line 2: not JSON (Expecting value at column 1).",
    ),
    "one object over several lines": (
        "t.json",
        json.dumps({"rows": []}, indent=2),
        "t.json, line 1: not a JSON object: '{' (Expecting property name enclosed in double quotes at column 2). The "
        "file is a single object; write an array of objects, or one object per line.",
    ),
    "by columns, as pandas writes it": (
        "t.json",
        lines({"sentence": {"0": "a"}, "label": {"0": "x"}}),
        "t.json: the table is written by columns. Write it by rows; in pandas, "
        "to_json(path, orient='records', lines=True).",
    ),
    "a key twice": ("t.jsonl", '{"label": 1, "label": 2}', "t.jsonl, line 1: an object has 'label' twice."),
    "another format": (
        "t.xlsx",
        "PK",
        "t.xlsx: a table must be a .csv, .tsv, .json, .jsonl or .parquet file, or the folder of a Hugging Face "
        "DatasetDict, not .xlsx.",
    ),
    "another folder": (
        "t/t.csv",
        GOOD,
        "t: not the folder of a Hugging Face Dataset or DatasetDict (save_to_disk).",
    ),
}


def write(folder, name, contents):
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(contents if isinstance(contents, bytes) else contents.encode())
    return str(path)


@pytest.mark.parametrize(("name", "contents", "message"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_table_is_refused_in_one_line(tmp_path, monkeypatch, name, contents, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, name, contents)
    with pytest.raises(ValueError) as refused:  # noqa: PT011  # compared whole below
        TextDataModule("none", name.split("/")[0]).setup("fit")
    assert str(refused.value) == message


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        (MultilabelTextDataModule, {"label": "x"}, "the column 'label' must be a list of classes, got 'x' (str)"),
        (MultilabelTextDataModule, {"label": ["x", ""]}, "a class must be a text or an integer, got '' (str)"),
        (TextRegressionDataModule, {"label": "high"}, "the column 'label' must be a finite number, got 'high' (str)"),
        (TextRegressionDataModule, {"label": True}, "the column 'label' must be a finite number, got True (bool)"),
        (TextRegressionDataModule, {"label": "inf"}, "the column 'label' must be a finite number, got 'inf' (str)"),
        (TextRegressionDataModule, {"label": math.inf}, "the column 'label' must be a finite number, got inf (float)"),
        (TextRegressionDataModule, {"label": "1_0"}, "the column 'label' must be a finite number, got '1_0' (str)"),
        (TextToTextDataModule, {"label": 3}, "the column 'label' must be a text, got 3 (int)"),
        (TokenDataModule, {"words": "a b", "tags": ["x"]}, "the column 'words' must be a list of words, got 'a b'"),
        (TokenDataModule, {"words": ["a", ""], "tags": ["x", "y"]}, "must be a list of words, got ['a', ''] (list)"),
        (TokenDataModule, {"words": ["a"], "tags": "x"}, "the column 'tags' must be a list of classes, got 'x' (str)"),
        (TokenDataModule, {"words": ["a"], "tags": ["x", "y"]}, "1 words in 'words' but 2 classes in 'tags'"),
    ],
)
def test_a_damaged_row_of_another_task(tmp_path, kind, row, message):
    path = write(tmp_path, "t.jsonl", lines({"sentence": "a"} | row))
    with pytest.raises(ValueError) as refused:  # noqa: PT011  # compared whole below
        kind("none", path, **(WORDS if kind is TokenDataModule else {})).setup("fit")
    assert str(refused.value).startswith(f"{path}, line 1: ")
    assert message in str(refused.value)


def test_several_labels_that_are_all_empty(tmp_path):
    path = write(tmp_path, "t.jsonl", lines({"sentence": "a", "label": []}))
    with pytest.raises(ValueError, match="All labels of the train table are empty, so there is nothing to learn"):
        MultilabelTextDataModule("none", path).setup("fit")


def test_a_file_that_is_not_there(tmp_path):
    write(tmp_path, "train.csv", GOOD)
    with pytest.raises(FileNotFoundError, match=r"trian\.csv: there is no such file\. Did you mean train\.csv\?"):
        TextDataModule("none", str(tmp_path / "trian.csv")).setup("fit")


def test_a_validation_table_is_checked_as_the_training_table_is(tmp_path):
    train, val = write(tmp_path, "train.csv", GOOD), write(tmp_path, "val.csv", GOOD + "c,z\n")
    data = TextDataModule("none", train, val)
    data.setup("fit")
    with pytest.raises(ValueError, match=r"val\.csv, line 4: the label 'z' is not one of the 2 classes \(x, y\)"):
        data.val_dataloader()


READ = {
    "byte-order mark": ("t.csv", b"\xef\xbb\xbf" + GOOD.encode()),
    "suffix in capitals": ("T.CSV", GOOD),
    "Windows": ("t.csv", GOOD.replace("\n", "\r\n")),
    "blank lines": ("t.csv", GOOD.replace("\n", "\n\n")),
    "no last line break": ("t.csv", GOOD.rstrip()),
    "quoted": ("t.csv", '"sentence","label"\n"a","x"\n"b","y"\n'),
    "tabs": ("t.tsv", GOOD.replace(",", "\t")),
    "lines": ("t.json", lines({"sentence": "a", "label": "x"}, {"sentence": "b", "label": "y"})),
    "array": ("t.json", json.dumps([{"sentence": "a", "label": "x"}, {"sentence": "b", "label": "y"}], indent=1)),
    "array with a byte-order mark": (
        "t.JSONL",
        b'\xef\xbb\xbf[{"sentence":"a","label":"x"},{"sentence":"b","label":"y"}]',
    ),
}  # fmt: skip


@pytest.mark.parametrize(("name", "contents"), READ.values(), ids=READ)
def test_the_same_table_in_many_ways(tmp_path, name, contents):
    assert read_table(write(tmp_path, name, contents)) == [
        {"sentence": "a", "label": "x"},
        {"sentence": "b", "label": "y"},
    ]


def test_long_texts_and_line_breaks_in_quotes(tmp_path):
    long = "word " * 40_000  # longer than Python's csv takes by itself
    table = read_table(write(tmp_path, "t.csv", f'sentence,label\n"{long}",x\n"two\nlines",y\nc,z\n'))
    assert [row["sentence"] for row in table] == [long, "two\nlines", "c"]
    assert [table.place(n).rpartition(", ")[2] for n in range(3)] == ["line 2", "line 3", "line 5"]


@pytest.mark.parametrize(
    ("name", "contents"),
    [
        ("t.csv", "sentence,label\na,10\nb, 9\nc,-1\n"),
        ("t.jsonl", lines(*({"sentence": "a", "label": label} for label in (10, 9, -1)))),
        ("t.json", json.dumps([{"sentence": "a", "label": label} for label in (10.0, 9.0, -1.0)])),  # pandas
        ("t.json", json.dumps([{"sentence": "a", "label": label} for label in ("10", "9", "-1")])),
    ],
)  # fmt: skip
def test_integers_sort_as_numbers_in_every_format(tmp_path, name, contents):
    data = TextDataModule("none", write(tmp_path, name, contents))
    data.setup("fit")
    assert data.labels == ["-1", "9", "10"]
    assert [data.index(label) for label in (10, "9", -1.0)] == [2, 1, 0]


def test_bools_have_the_same_names_in_every_format(tmp_path):
    train = write(tmp_path, "train.jsonl", lines(*({"sentence": "a", "label": label} for label in (True, False))))
    data = TextDataModule("none", train, write(tmp_path, "val.csv", "sentence,label\na,true\n"))
    data.setup("fit")
    assert data.labels == ["false", "true"]
    assert [data.index(row["label"]) for row in data.table("val")] == [data.index(True)] == [1]


def test_a_class_twice():
    with pytest.raises(ValueError, match="labels contains 'x' twice"):
        TextDataModule("none", labels=["x", "y", "x"])


def test_without_a_training_table_the_classes_are_asked_for(tmp_path):
    data = TextDataModule("none", test=write(tmp_path, "t.csv", GOOD))
    data.setup("test")
    with pytest.raises(ValueError, match=r"Pass the ckpt_path of a model that was trained on them, or labels"):
        data.test_dataloader()
    data.labels = ["x", "y"]  # as a checkpoint does
    assert len(data.test_dataloader().dataset) == 2


@pytest.fixture
def saved(tmp_path):
    """A DatasetDict in a folder, and its training split as a Parquet file."""
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    )
    rows = {"sentence": ["a", "b"], "label": [1, 0]}
    train = datasets.Dataset.from_dict(rows, features)
    test = datasets.Dataset.from_dict({"sentence": ["c"], "label": [-1]}, features)
    datasets.DatasetDict({"train": train, "validation": train, "test": test}).save_to_disk(tmp_path / "all")
    train.to_parquet(tmp_path / "train.parquet")
    return tmp_path


def test_hugging_face_tables_have_the_names_of_their_classes(saved):
    expected = [{"sentence": "a", "label": "yes"}, {"sentence": "b", "label": "no"}]
    assert read_table(saved / "train.parquet") == expected
    assert read_table(saved / "all", "train") == expected
    assert read_table(saved / "all", "val") == expected
    assert read_table(saved / "all/train") == expected
    assert read_table(saved / "all", "test") == [{"sentence": "c", "label": None}]  # -1 is none
    data = TextDataModule("none", str(saved / "all"), str(saved / "all"))
    data.setup("fit")
    assert data.labels == ["no", "yes"]
    assert data.val_dataloader().dataset == expected


def test_lists_of_classes_have_names_and_structs_keep_their_fields(tmp_path):
    datasets = pytest.importorskip("datasets")
    text = datasets.Value("string")
    label = datasets.ClassLabel(names=["no", "yes"])
    struct = {"names": text, "feature": {"names": text}}
    features = datasets.Features({"tags": datasets.List(label), "large": datasets.LargeList(label), "person": struct})
    row = {"tags": [1, -1], "large": [0], "person": {"names": "Ann", "feature": {"names": "Bob"}}}
    table = datasets.Dataset.from_list([row], features)
    table.save_to_disk(tmp_path / "saved")
    table.to_parquet(tmp_path / "t.parquet")
    for name in ("saved", "t.parquet"):
        assert read_table(tmp_path / name) == [row | {"tags": ["yes", None], "large": ["no"]}]


def test_a_hugging_face_split_that_is_not_there(saved):
    with pytest.raises(ValueError, match=r"the splits train, validation, test, but none for 'predict'\. .*all.train"):
        read_table(saved / "all", "predict")
    (saved / "bad.parquet").write_text("sentence,label")
    with pytest.raises(ValueError, match=r"bad\.parquet: not a Parquet file"):
        read_table(saved / "bad.parquet")


@pytest.mark.parametrize(("name", "module"), [("train.parquet", "pyarrow"), ("all", "datasets")])
def test_a_missing_extra_names_itself(saved, monkeypatch, name, module):
    for one in (module, f"{module}.parquet"):
        monkeypatch.setitem(__import__("sys").modules, one, None)
    with pytest.raises(ModuleNotFoundError, match=rf'needs {module}.*: pip install "lightning-rdrop\[datasets\]"'):
        read_table(saved / name, "train")


def test_each_text_is_tokenized_once(tmp_path, bert):
    class Counting(TextDataModule):
        texts = 0

    data = Counting(bert, write(tmp_path, "t.csv", "sentence,label\na b c,x\nd,y\na b c,y\n"), batch_size=2)
    data.setup("fit")
    tokenize = data.tokens._tokenizer.__class__.__call__

    def counted(self, text, *arguments, **more):
        Counting.texts += len(text)
        return tokenize(self, text, *arguments, **more)

    data.tokens._tokenizer.__class__ = type("Counted", (type(data.tokens._tokenizer),), {"__call__": counted})
    epochs = [list(data.train_dataloader()) for _ in range(3)]
    assert Counting.texts == 2  # of three, one comes twice
    assert sum(len(batch["labels"]) for epoch in epochs for batch in epoch) == 9
    assert all(torch.equal(batch["attention_mask"].bool(), batch["input_ids"] != 0) for e in epochs for batch in e)


def test_workers_find_all_texts_tokenized(tmp_path, bert):
    data = TextDataModule(bert, write(tmp_path, "t.csv", "sentence,label\na b c,x\nd,y\n"), num_workers=1)
    data.setup("fit")
    data.train_dataloader()
    assert sorted(key[0] for key in data.tokens._known) == ["a b c", "d"]
