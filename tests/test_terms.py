import pytest
import torch

from lightning_rdrop import Average


def test_averages_of_parts_add_to_that_of_the_whole():
    x, w = torch.rand(10, dtype=torch.float64), torch.rand(10, dtype=torch.float64)
    parts = [Average((x[part] * w[part]).sum(), w[part].sum()) for part in (slice(0, 3), slice(3, 4), slice(4, 10))]
    whole = parts[0] + parts[1] + parts[2]
    torch.testing.assert_close(whole.mean, (x * w).sum() / w.sum())


def test_nothing_averages_to_zero_with_a_gradient_of_zero():
    x = torch.ones(3, requires_grad=True)
    mean = Average((x * 0).sum(), torch.tensor(0.0)).mean
    mean.backward()
    assert mean == 0
    assert (x.grad == 0).all()


@pytest.mark.parametrize("shape", [(4, 1), (3,), (4,), ()])
def test_a_mask_or_a_weight_of_another_shape_is_refused(shape):
    values = torch.ones(4, 3)
    with pytest.raises(ValueError, match=r"counted must have the shape of values, \(4, 3\), got .*not broadcast"):
        Average.of(values, torch.ones(shape, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"weights must have the shape of totals, \(4, 3\), got .*not broadcast"):
        Average.over(values, torch.ones(shape))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.bool, torch.uint8])
def test_rows_are_counted_in_float32_or_better(dtype):
    values, all_of_them = torch.ones(80001, dtype=dtype), torch.ones(80001, dtype=torch.bool)
    found = [Average.of(values), Average.of(values, all_of_them), Average.over(values, values)]
    for average in (*found, found[0].weighted(torch.ones(80001))):
        assert average.total == average.weight == 80001
        assert average.weight.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
