import math

import pytest
import torch

from lightning_rdrop import RDropLoss, convert_alpha
from tests import reference

CODES = {
    "paper": reference.paper_loss,
    "fairseq": reference.paper_loss,
    "official-sum": lambda *args: reference.official_snippet(*args, "sum"),
    "official-mean": lambda *args: reference.official_snippet(*args, "mean"),
    "official-glue": reference.official_glue,
    "official-vit": reference.official_vit,
    "su": lambda first, second, *args: reference.su_loss(torch.stack([first, second], 1).flatten(0, 1), *args),
    "ofa": lambda first, second, *args: reference.su_loss(torch.stack([first, second], 1).flatten(0, 1), *args),
    "bert4torch": reference.bert4torch,
    "paddlenlp-sum": lambda *args: reference.paddlenlp(*args, "sum"),
    "paddlenlp-batchmean": lambda *args: reference.paddlenlp(*args, "batchmean"),
    "paddlenlp-mean": lambda *args: reference.paddlenlp(*args, "mean"),
}


@pytest.mark.parametrize("source", CODES)
def test_convert_alpha_weighs_the_terms_as_the_source_does(source):
    predictions, target = 2 * torch.randn(2, 7, 5, dtype=torch.float64), torch.arange(7) % 5
    predictions.requires_grad_()
    doubled = 2 if source in ("paper", "fairseq", "official-glue", "official-vit") else 1
    theirs = CODES[source](predictions[0], predictions[1], target, 0.3)
    alpha = convert_alpha(0.3, source, batch_size=7, num_classes=5)
    ours = RDropLoss()(predictions, target, alpha).loss
    (expected,), (found,) = (torch.autograd.grad(loss, predictions) for loss in (theirs, ours))
    torch.testing.assert_close(expected, doubled * found, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1.0, "offical-sum"), "'offical-sum' is unknown: did you mean official-sum"),
        ((1.0, "zzz"), "It must be one of paper, fairseq"),
        ((-1.0, "su"), r"alpha must be a finite number >= 0, got -1\.0"),
        ((math.nan, "su"), "alpha must be"),
        ((1.0, "official-sum"), "depends on batch_size: pass batch_size="),
        ((1.0, "bert4torch"), "depends on num_classes: pass num_classes="),
    ],
)
def test_convert_alpha_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        convert_alpha(*arguments)
