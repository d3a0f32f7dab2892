"""Distances: how a prediction is compared with a target, and two predictions with each other. One per file."""

from lightning_rdrop.distance.bernoulli import Bernoulli
from lightning_rdrop.distance.categorical import Categorical
from lightning_rdrop.distance.cosine import Cosine
from lightning_rdrop.distance.ctc import CTC
from lightning_rdrop.distance.distance import Distance, RowMask, measured
from lightning_rdrop.distance.focal import Focal
from lightning_rdrop.distance.from_distribution import FromDistribution
from lightning_rdrop.distance.gaussian import Gaussian
from lightning_rdrop.distance.jensen_shannon import JensenShannon
from lightning_rdrop.distance.masked_consistency import MaskedConsistency
from lightning_rdrop.distance.together import Together
from lightning_rdrop.distance.weighted import Weighted

__all__ = [
    "CTC",
    "Bernoulli",
    "Categorical",
    "Cosine",
    "Distance",
    "Focal",
    "FromDistribution",
    "Gaussian",
    "JensenShannon",
    "MaskedConsistency",
    "RowMask",
    "Together",
    "Weighted",
    "measured",
]
