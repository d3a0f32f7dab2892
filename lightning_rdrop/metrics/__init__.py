"""What dropout does to predictions: torchmetrics over K dropout passes of the same rows, with functional twins.

Dropout trains an average of many networks, one for each mask, and what is used afterwards is one network with averaged
weights, dropout off. R-Drop's explanation by Su Jianlin (spaces.ac.cn/archives/8496) is that its kl closes the gap
between the two. These metrics measure that gap, and what makes it.

The passes come first: K predictions of N rows are one tensor (K, N, ...), such as
:func:`~lightning_rdrop.dropout_passes` makes. A metric is told how to read them by a distance, as the loss is, and its
default is :class:`~lightning_rdrop.Categorical`: logits (K, N, ..., C). For the calibration of a prediction there is
:class:`torchmetrics.classification.MulticlassCalibrationError`.
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
