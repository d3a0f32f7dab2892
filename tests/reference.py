"""The published formulas and the losses of other codes, written out: what the package is held against.

Logits are (N, C) for each view, targets (N,). KL(p || q) is written with torch's own log-softmax, in the dtype given.
"""

import torch
from torch.nn import functional as F


def kl(first, second):
    """KL(p || q), an entry a row and class: what F.kl_div(log q, p, reduction="none") gives."""
    log_p, log_q = first.log_softmax(-1), second.log_softmax(-1)
    return log_p.exp() * (log_p - log_q)


def both_ways(first, second):
    return kl(first, second) + kl(second, first)


def paper_loss(first, second, target, alpha):
    """Liang et al. 2021, equations 2 to 4: CE1 + CE2 + alpha/2 [KL(1 || 2) + KL(2 || 1)], averaged over the rows."""
    ce = F.cross_entropy(first, target) + F.cross_entropy(second, target)
    return ce + alpha / 2 * both_ways(first, second).sum(-1).mean()


def su_loss(interleaved, target, alpha):
    """bojone/r-drop: rows 0 and 1 are one example, rows 2 and 3 the next; mean(ce) + mean(kl12 + kl21) / 4 * alpha."""
    ce = F.cross_entropy(interleaved, target.repeat_interleave(2), reduction="none")
    first, second = interleaved[::2], interleaved[1::2]
    return ce.mean() + both_ways(first, second).sum(-1).mean() / 4 * alpha


def official_snippet(first, second, target, alpha, reduction):
    """The README of the official repository: 0.5 (ce1 + ce2) + alpha (kl12 + kl21) / 2, each kl summed or averaged."""
    ce = 0.5 * (F.cross_entropy(first, target) + F.cross_entropy(second, target))
    return ce + alpha * getattr(both_ways(first, second), reduction)() / 2


def official_kl(first, second):
    """Its divergences to the letter: log-probabilities against probabilities, whose own logarithm kl_div takes."""
    one = F.kl_div(F.log_softmax(first, -1), F.softmax(second, -1), reduction="sum")
    return (one + F.kl_div(F.log_softmax(second, -1), F.softmax(first, -1), reduction="sum")) / 2


def official_glue(first, second, target, alpha):
    """Its code for BERT: the two cross-entropies are not averaged, the divergences are summed over the batch."""
    ce = F.cross_entropy(first, target) + F.cross_entropy(second, target)
    return ce + alpha * both_ways(first, second).sum() / 2


def official_vit(first, second, target, alpha):
    """Its code for ViT, on one micro-batch."""
    ce = F.cross_entropy(first, target) + F.cross_entropy(second, target)
    return ce + alpha * both_ways(first, second).sum()


def bert4torch(first, second, target, alpha):
    ce = F.cross_entropy(torch.cat([first, second]), torch.cat([target, target]))
    return ce + both_ways(first, second).mean() / 4 * alpha


def paddlenlp(first, second, target, alpha, reduction):
    """ce + alpha RDropLoss(reduction), whose kl is (kl12 + kl21) / 2, reduced over batch and classes."""
    ce = 0.5 * (F.cross_entropy(first, target) + F.cross_entropy(second, target))
    entries = both_ways(first, second) / 2
    reduced = {"sum": entries.sum(), "mean": entries.mean(), "batchmean": entries.sum() / len(entries)}
    return ce + alpha * reduced[reduction]
