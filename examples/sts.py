"""The Chinese STS-B: a folder with train.txt, dev.txt and test.txt, whose lines are id||first||second||score."""

from collections.abc import Sequence
from pathlib import Path

from lightning_rdrop.data import Row, SentencePairDataModule


class ChineseSTS(SentencePairDataModule):
    """5,231 pairs of sentences for training, without their scores; 1,458 for validation and 1,361 for test.

    Args:
        folder: contains the three files.
        tokenizer: the encoder's, by name or folder.
        batch_size: sentences in a batch.
        max_length: longer sentences are truncated, in tokens.
    """

    def __init__(self, folder: str, tokenizer: str, batch_size: int = 64, max_length: int = 64) -> None:
        super().__init__(tokenizer, pair="second", label="score", batch_size=batch_size, max_length=max_length)
        self.folder = Path(folder)

    def rows(self, split: str) -> Sequence[Row] | None:
        if split not in ("train", "val", "test"):
            return None
        path = self.folder / ("dev.txt" if split == "val" else f"{split}.txt")
        lines = [line.split("||") for line in path.read_text("utf8").split("\n") if line]
        return [{"sentence": first, "second": second, "score": float(score)} for _, first, second, score in lines]
