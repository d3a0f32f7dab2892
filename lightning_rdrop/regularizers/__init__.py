"""Methods to compare R-Drop with, as additional terms of the mixin's loss. One per file."""

from lightning_rdrop.regularizers.fgm import FGM
from lightning_rdrop.regularizers.gradient_penalty import GradientPenalty
from lightning_rdrop.regularizers.regularizer import Regularizer, distinct, logged_names
from lightning_rdrop.regularizers.vat import VAT

__all__ = ["FGM", "VAT", "GradientPenalty", "Regularizer", "distinct", "logged_names"]
