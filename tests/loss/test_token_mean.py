import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_ft.loss.token_mean import TokenMean

micro_batches = st.lists(st.integers(0, 9), min_size=1, max_size=6)


@settings(deadline=None)
@given(sizes=micro_batches, seed=st.integers(0, 1000))
def test_unequal_micro_batches_equal_one_batch(sizes, seed):
    torch.manual_seed(seed)
    values = torch.randn(sum(sizes), dtype=torch.float64)

    def gradient_of(parts):
        weight = torch.ones((), dtype=torch.float64, requires_grad=True)
        window = TokenMean(lambda tensor: tensor)
        for part in parts:
            window.add((weight.sin() * part).sum(), len(part)).backward()
        loss, count = window.finish([weight])
        return weight.grad, loss, count

    cut, cut_loss, cut_count = gradient_of(values.split(sizes))
    whole, loss, count = gradient_of([values])
    torch.testing.assert_close(cut, whole)
    torch.testing.assert_close(cut_loss, loss)
    assert cut_count == count == sum(sizes)


def test_the_next_window_forgets_the_last():
    window = TokenMean(lambda tensor: tensor)
    weight = torch.ones((), requires_grad=True)
    for size in (5, 2):
        weight.grad = None
        window.add(weight * size, size).backward()
        loss, count = window.finish([weight])
        assert (loss.item(), count, weight.grad.item()) == (1.0, size, 1.0)
