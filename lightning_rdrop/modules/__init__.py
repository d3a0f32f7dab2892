"""Ready-made LightningModules, one for each task, for the CLI and for scripts."""

from lightning_rdrop.modules.causal_lm import CausalLM
from lightning_rdrop.modules.classifier import Classifier
from lightning_rdrop.modules.image_classifier import ImageClassifier
from lightning_rdrop.modules.multilabel_classifier import MultilabelClassifier
from lightning_rdrop.modules.regressor import Regressor
from lightning_rdrop.modules.sentence_encoder import SentenceEncoder
from lightning_rdrop.modules.seq2seq import Seq2Seq
from lightning_rdrop.modules.sequence_classifier import SequenceClassifier
from lightning_rdrop.modules.sequence_multilabel_classifier import SequenceMultilabelClassifier
from lightning_rdrop.modules.sequence_regressor import SequenceRegressor
from lightning_rdrop.modules.task import Task
from lightning_rdrop.modules.token_classifier import TokenClassifier

__all__ = [
    "CausalLM",
    "Classifier",
    "ImageClassifier",
    "MultilabelClassifier",
    "Regressor",
    "SentenceEncoder",
    "Seq2Seq",
    "SequenceClassifier",
    "SequenceMultilabelClassifier",
    "SequenceRegressor",
    "Task",
    "TokenClassifier",
]
