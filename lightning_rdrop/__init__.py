"""R-Drop for PyTorch Lightning: a mixin, callbacks and a command line."""

from lightning_rdrop.callbacks import AdaptiveAlpha, AlphaScheduler
from lightning_rdrop.cross_entropy import Head, linear_rdrop_cross_entropy, rdrop_cross_entropy
from lightning_rdrop.data_views import Views
from lightning_rdrop.distance import (
    CTC,
    Bernoulli,
    Categorical,
    Cosine,
    Distance,
    Focal,
    FromDistribution,
    Gaussian,
    JensenShannon,
    MaskedConsistency,
    Together,
    Weighted,
)
from lightning_rdrop.divergence import jensen_shannon, symmetric_bernoulli_kl, symmetric_kl
from lightning_rdrop.loss import RDropLoss
from lightning_rdrop.mixin import RDropMixin
from lightning_rdrop.own_losses import WithLosses
from lightning_rdrop.predict import MCPrediction, dropout_passes, mc_predict
from lightning_rdrop.regularizers import FGM, VAT, GradientPenalty, Regularizer
from lightning_rdrop.scales import convert_alpha
from lightning_rdrop.simcse import SimCSEMixin
from lightning_rdrop.terms import Average, Terms

__all__ = [
    "CTC",
    "FGM",
    "VAT",
    "AdaptiveAlpha",
    "AlphaScheduler",
    "Average",
    "Bernoulli",
    "Categorical",
    "Cosine",
    "Distance",
    "Focal",
    "FromDistribution",
    "Gaussian",
    "GradientPenalty",
    "Head",
    "JensenShannon",
    "MCPrediction",
    "MaskedConsistency",
    "RDropLoss",
    "RDropMixin",
    "Regularizer",
    "SimCSEMixin",
    "Terms",
    "Together",
    "Views",
    "Weighted",
    "WithLosses",
    "convert_alpha",
    "dropout_passes",
    "jensen_shannon",
    "linear_rdrop_cross_entropy",
    "mc_predict",
    "rdrop_cross_entropy",
    "symmetric_bernoulli_kl",
    "symmetric_kl",
]
__version__ = "0.1.0"
