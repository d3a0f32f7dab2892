import pytest
import torch

from lightning_rdrop.transforms import RandomReplacement

TEXTS = torch.arange(1, 13).repeat(2000, 1)  # a start token, eleven others


def test_a_share_of_the_texts_is_changed_and_a_share_of_their_tokens():
    replaced = RandomReplacement(0.5, examples=0.25)(TEXTS)
    assert replaced.shape == TEXTS.shape
    assert (replaced[:, 0] == 1).all()  # the start
    changed = (replaced != TEXTS).any(1)
    assert changed.float().mean() == pytest.approx(0.25, abs=0.04)  # 4 standard deviations; an unchanged one is rare
    # one of the eleven tokens that may be drawn is the token itself
    assert (replaced != TEXTS)[changed, 1:].float().mean() == pytest.approx(0.5 * 10 / 11, abs=0.03)


def test_every_token_of_the_text_is_drawn_alike():
    counts = RandomReplacement(1.0, examples=1.0)(TEXTS)[:, 1:].flatten().bincount(minlength=13)
    assert counts[:2].tolist() == [0, 0]  # the start is not drawn
    expected = 2000 * 11 / 11
    assert ((counts[2:] - expected).abs() < 5 * expected**0.5).all()


def test_special_tokens_stay_and_are_not_drawn():
    tokens = torch.tensor([[2, 7, 8, 9, 1, 0], [2, 5, 6, 1, 0, 0]]).repeat(500, 1)
    replaced = RandomReplacement(1.0, examples=1.0, special=[0, 1, 2])(tokens)
    special = tokens < 3
    assert torch.equal(replaced[special], tokens[special])
    assert set(replaced[::2][~special[::2]].tolist()) == {7, 8, 9}
    assert set(replaced[1::2][~special[1::2]].tolist()) == {5, 6}
    assert tokens[0].tolist() == [2, 7, 8, 9, 1, 0]  # not changed in place


@pytest.mark.parametrize("arguments", [{"probability": 0.0}, {"examples": 0.0}])
def test_nothing_is_replaced_with_probability_0(arguments):
    assert torch.equal(RandomReplacement(**arguments)(TEXTS), TEXTS)


def test_a_text_of_special_tokens_only():
    tokens = torch.zeros(3, 4, dtype=torch.long)
    assert torch.equal(RandomReplacement(1.0, examples=1.0, special=[0])(tokens), tokens)


@pytest.mark.parametrize("arguments", [{"probability": 1.5}, {"probability": -0.1}, {"examples": 2.0}])
def test_probabilities_out_of_range(arguments):
    ((name, value),) = arguments.items()
    with pytest.raises(ValueError, match=rf"{name} must be a probability, 0 <= {name} <= 1, got {value}"):
        RandomReplacement(**arguments)
