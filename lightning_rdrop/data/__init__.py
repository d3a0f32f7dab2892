"""Tables of text and folders of images, and a LightningDataModule for each kind of label."""

from lightning_rdrop.data.chat import ChatDataModule
from lightning_rdrop.data.images import ImageFolderDataModule
from lightning_rdrop.data.multilabel import MultilabelTextDataModule
from lightning_rdrop.data.read import read_table
from lightning_rdrop.data.regression import TextRegressionDataModule
from lightning_rdrop.data.sentence_pairs import SentencePairDataModule
from lightning_rdrop.data.table import Row, Table
from lightning_rdrop.data.text import TextDataModule
from lightning_rdrop.data.text_to_text import TextToTextDataModule
from lightning_rdrop.data.tokens import TokenDataModule

__all__ = [
    "ChatDataModule",
    "ImageFolderDataModule",
    "MultilabelTextDataModule",
    "Row",
    "SentencePairDataModule",
    "Table",
    "TextDataModule",
    "TextRegressionDataModule",
    "TextToTextDataModule",
    "TokenDataModule",
    "read_table",
]
