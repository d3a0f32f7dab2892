"""How dropout affects predictions: metrics over K dropout passes of the same rows, as classes and as functions.

Dropout trains an average of many networks, one for each mask, but inference uses one network with averaged weights and
dropout off. Su Jianlin explains R-Drop by its kl, which closes the gap between the two (spaces.ac.cn/archives/8496).
These metrics measure that gap and its causes.

The passes come first: K predictions of N rows are one tensor (K, N, ...), as :func:`~lightning_rdrop.dropout_passes`
returns them. A distance defines how they are read, as in the loss; the default is :class:`~lightning_rdrop.Categorical`
with logits (K, N, ..., C). For calibration use :class:`torchmetrics.classification.MulticlassCalibrationError`.
"""

from lightning_rdrop.metrics.average_gap import AverageGap, average_gap
from lightning_rdrop.metrics.dropout_disagreement import DropoutDisagreement, dropout_disagreement
from lightning_rdrop.metrics.dropout_kl import DropoutKL, dropout_kl

__all__ = [
    "AverageGap",
    "DropoutDisagreement",
    "DropoutKL",
    "average_gap",
    "dropout_disagreement",
    "dropout_kl",
]
