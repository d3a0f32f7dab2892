"""Views that were alive and died are seen, once; what never lived, or is equal now and then, is not."""

import weakref

import torch

from lightning_rdrop.guard.equal_watch import EqualWatch


def noted(*kls):
    watch = EqualWatch()
    for kl in kls:
        watch.note(torch.tensor(kl))
    return watch


def test_sixteen_equal_steps_after_a_living_one():
    assert noted(1e-3, *[0.0] * 16).became_equal()
    assert not noted(1e-3, *[0.0] * 15).became_equal()
    assert not noted(*[0.0] * 40).became_equal()
    assert not noted(*[1e-3, *[0.0] * 10] * 5).became_equal()


def test_steps_add_up_over_several_looks():
    watch = noted(1e-3, *[0.0] * 10)
    assert not watch.became_equal()
    for _ in range(6):
        watch.note(torch.tensor(0.0))
    assert watch.became_equal()
    assert not watch.became_equal()  # it is said once
    watch.note(torch.tensor(1e-3))
    for _ in range(16):
        watch.note(torch.tensor(1e-12))
    assert watch.became_equal()


def test_nan_is_not_equal():
    assert not noted(1e-3, *[float("nan")] * 20).became_equal()


def test_no_step_is_kept_alive():
    kept = []

    def pack(tensor):
        kept.append(weakref.ref(tensor := tensor.detach()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kl = torch.ones(3, requires_grad=True).exp().sum()
    watch = EqualWatch()
    watch.note(kl)
    assert kept[0]() is not None
    del kl
    assert kept[0]() is None


def test_nothing_noted():
    assert not EqualWatch().became_equal()


def test_views_that_are_both_sure_of_a_class_differ():
    watch = noted(1e-3, *[0.0] * 16)
    watch.look(torch.tensor([[[90.0, 0.0]], [[80.0, 0.0]]]))
    assert not watch.became_equal()
