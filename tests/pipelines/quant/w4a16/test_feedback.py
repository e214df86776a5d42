import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from pipelines.quant.w4a16.feedback import feedback, inverse_factor
from pipelines.quant.w4a16.rounding import quantize_groups


def inputs(tokens=300, channels=64, seed=0):
    """Correlated channels of unlike size: what feedback can use."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(tokens, 24, generator=generator) @ torch.randn(24, channels, generator=generator)
    return (mixed + 0.3 * torch.randn(tokens, channels, generator=generator)) * torch.logspace(-1, 1, channels)


def gram_of(x):
    return x.t() @ x / len(x)


def error(weight, codes, gram):
    difference = (codes.dequantize() - weight).double()
    return float(((difference @ gram.double()) * difference).sum())


WEIGHT = torch.randn(40, 64, generator=torch.Generator().manual_seed(1))


def test_the_factor_is_that_of_the_damped_inverse():
    gram = gram_of(inputs())
    factor = inverse_factor(gram).double()
    damped = gram.double() + 0.01 * gram.double().diagonal().mean() * torch.eye(64, dtype=torch.float64)
    assert torch.equal(factor, factor.triu())
    torch.testing.assert_close(factor.t() @ factor @ damped, torch.eye(64, dtype=torch.float64), atol=1e-4, rtol=0)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("clip", [False, True])
def test_against_a_plain_column_loop_in_float64(clip, symmetric):
    """The same codes as rounding one column at a time and moving all later ones at once (Frantar et al., algorithm 1).

    With `clip` levels depend on the moved columns; they are taken from the result, and the codes must then agree."""
    gram = gram_of(inputs())
    codes, left = feedback(WEIGHT, inverse_factor(gram), 32, symmetric=symmetric, clip=clip)
    damped = gram.double() + 0.01 * gram.double().diagonal().mean() * torch.eye(64, dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    rest, total, differing = WEIGHT.double().clone(), 0.0, 0
    for column in range(64):
        scale, zero = codes.scales[:, column // 32].double(), codes.zeros[:, column // 32].double()
        wanted = (rest[:, column] / scale + zero).round().clamp(0, 15)
        differing += int((wanted != codes.codes[:, column]).sum())
        value = (codes.codes[:, column].double() - zero) * scale
        step = (rest[:, column] - value) / upper[column, column]
        total += float(step.square().sum())
        rest[:, column + 1 :] -= step[:, None] * upper[column, column + 1 :]
    assert differing <= 2  # of 2560: halves that float32 rounds the other way
    assert left == pytest.approx(total, rel=1e-3)
    assert (codes.zeros == 8).all() == symmetric


def test_the_error_returned_is_the_quadratic_form_of_the_damped_matrix():
    gram = gram_of(inputs())
    codes, left = feedback(WEIGHT, inverse_factor(gram), 32)
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(64)
    assert left == pytest.approx(error(WEIGHT, codes, damped), rel=1e-3)


def test_feedback_leaves_much_less_than_rounding_to_nearest():
    gram = gram_of(inputs())
    nearest = error(WEIGHT, quantize_groups(WEIGHT, 32), gram)
    plain = error(WEIGHT, feedback(WEIGHT, inverse_factor(gram), 32)[0], gram)
    clipped = error(WEIGHT, feedback(WEIGHT, inverse_factor(gram), 32, clip=True)[0], gram)
    assert plain < 0.8 * nearest and clipped < plain


def test_a_scaled_factor_is_the_factor_of_scaled_inputs():
    x, scale = inputs(), torch.logspace(-0.5, 0.5, 64).flip(0)
    factor = inverse_factor(gram_of(x))
    damped = gram_of(x) + 0.01 * gram_of(x).diagonal().mean() * torch.eye(64)
    expected = torch.linalg.inv(damped.double() / scale.double() / scale.double()[:, None])
    actual = (factor * scale).double()
    torch.testing.assert_close(actual.t() @ actual, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("channels", [slice(3, 9), slice(0, 64)], ids=["some", "all"])
def test_channels_that_are_never_active(channels):
    x = inputs()
    x[:, channels] = 0
    codes, left = feedback(WEIGHT, inverse_factor(gram_of(x)), 32)
    assert torch.isfinite(codes.dequantize()).all() and left >= 0
    nearest = quantize_groups(WEIGHT, 32)
    # A dead channel still gets the code next to its weight.
    assert (codes.dequantize() - WEIGHT)[:, channels].abs().max() < 2 * nearest.scales.max()


def test_one_token_is_enough():
    codes, _ = feedback(WEIGHT, inverse_factor(gram_of(inputs(tokens=1))), 32)
    assert torch.isfinite(codes.dequantize()).all()


def test_weights_of_zeros_and_constant_groups_are_exact():
    factor = inverse_factor(gram_of(inputs()))
    for weight in (torch.zeros(8, 64), torch.full((8, 64), 15 / 64)):
        codes, left = feedback(weight, factor, 32, clip=True)
        assert torch.equal(codes.dequantize(), weight) and left == 0


def test_an_indefinite_matrix_is_refused():
    with pytest.raises(ValueError, match="not positive definite"):
        inverse_factor(torch.diag(torch.tensor([1.0, 1.0, -50000.0])))


def test_a_factor_takes_the_memory_of_two_matrices_beside_the_gram():
    gram = gram_of(inputs(channels=256))
    with LiveBytes() as live:
        inverse_factor(gram)
    assert live.most <= 2.1 * 8 * gram.numel()


class LiveBytes(TorchDispatchMode):
    """`most`: the bytes of the tensors made in here that lived at once."""

    def __init__(self):
        super().__init__()
        self.most, self._made = 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self._made.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        self._made = {key: made for key, made in self._made.items() if not made[0].expired()}
        self.most = max(self.most, sum(size for _, size in self._made.values()))
        return out
