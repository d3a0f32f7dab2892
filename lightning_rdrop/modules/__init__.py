"""Ready-made LightningModules, a task a file: for the CLI, or to be used as they are."""

from lightning_rdrop.modules.classifier import Classifier
from lightning_rdrop.modules.sequence_classifier import SequenceClassifier
from lightning_rdrop.modules.task import Task

__all__ = ["Classifier", "SequenceClassifier", "Task"]
