import pytest
import torch

from engine.kernels.reference import quantize_rows, unpack_int4
from engine.models.linear import DenseLinear, Int4Linear, Int8Linear, Int8Rows, MixedLinear, read_linear, stack

INNER = 16


def words(rows, outer, generator):
    return torch.randint(-(2**31), 2**31, (rows, outer // 8), generator=generator).int()


def quantized(outer, *, group=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "qweight": words(INNER, outer, generator),
        "qzeros": words(INNER // group, outer, generator),
        "scales": torch.rand(INNER // group, outer, generator=generator).half(),
    }


def dense(outer, *, seed=0):
    return {"weight": torch.randn(outer, INNER, generator=torch.Generator().manual_seed(seed))}


def int8(outer, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "weight": torch.randint(-127, 128, (outer, INNER), generator=generator, dtype=torch.int8),
        "weight_scale": torch.rand(outer, generator=generator),
    }


def bias(outer):
    return {"bias": torch.arange(outer).float()}


def read(*kinds):
    tensors = {f"m{i}.{part}": x for i, kind in enumerate(kinds) for part, x in kind.items()}
    return [read_linear(tensors, f"m{i}", device="cpu", dtype=torch.float32) for i in range(len(kinds))]


CASES = {
    "dense": ([dense(8), dense(16, seed=1)], DenseLinear),
    "int4": ([quantized(8), quantized(16, seed=1), quantized(8, seed=2)], Int4Linear),
    "one dense, one int4": ([dense(8), quantized(16)], MixedLinear),
    "two group sizes": ([quantized(8), quantized(16, group=16)], MixedLinear),
    "int8": ([int8(8), int8(5, seed=1), int8(3, seed=2)], Int8Linear),
    "int8, some biases": ([int8(8) | bias(8), int8(3, seed=1)], Int8Linear),
    "one int8, one dense": ([int8(8), dense(16)], MixedLinear),
    "dense, some biases": ([dense(8) | bias(8), dense(16)], DenseLinear),
    "int4, some biases": ([quantized(8), quantized(16) | bias(16)], Int4Linear),
}


@pytest.mark.parametrize(("kinds", "expected"), CASES.values(), ids=CASES.keys())
def test_stack_gives_the_outputs_side_by_side(kinds, expected):
    linears = read(*kinds)
    joined = stack(linears)
    assert type(joined) is expected
    x = torch.randn(3, INNER, generator=torch.Generator().manual_seed(9))
    apart = torch.cat([linear.forward(x) for linear in linears], dim=-1)
    assert torch.allclose(joined.forward(x), apart, atol=1e-5)
    reversed_order = torch.cat([linear.forward(x) for linear in linears[::-1]], dim=-1)
    assert not torch.allclose(joined.forward(x), reversed_order, atol=1e-2)


def test_int4_computes_with_the_unpacked_weight_and_its_bias():
    tensors = quantized(8) | bias(8)
    (linear,) = read(tensors)
    x = torch.randn(2, 3, INNER)
    exact = x @ unpack_int4(tensors["qweight"], tensors["qzeros"], tensors["scales"]).T + tensors["bias"]
    assert torch.allclose(linear.forward(x), exact, atol=1e-4)


def test_int8_reads_floats_and_rows_that_are_quantized_already():
    tensors = int8(8) | bias(8)
    (linear,) = read(tensors)
    x = torch.randn(2, 3, INNER, generator=torch.Generator().manual_seed(5))
    weight = tensors["weight"].double() * tensors["weight_scale"].double()[:, None]
    exact = x.double() @ weight.T + tensors["bias"].double()
    assert (linear.forward(x) - exact).abs().max() < 0.03 * exact.abs().max()
    rows = Int8Rows(*quantize_rows(x), torch.float32)
    assert torch.equal(linear.forward(rows), linear.forward(x))
    assert (rows.dense() - x).abs().max() <= rows.scales.max() / 2 * 1.001
    half = linear.forward(Int8Rows(rows.values, rows.scales, torch.float16))
    assert half.dtype == torch.float16 and half.shape == (2, 3, 8)


def test_weights_are_cast_but_the_scales_of_groups_are_not():
    tensors = {f"m.{name}": x for name, x in (dense(8) | bias(8)).items()}
    linear = read_linear(tensors, "m", device="cpu", dtype=torch.bfloat16)
    assert linear.weight.dtype == linear.bias.dtype == torch.bfloat16
    tensors = {f"m.{name}": x for name, x in (quantized(8) | bias(8)).items()}
    linear = read_linear(tensors, "m", device="cpu", dtype=torch.bfloat16)
    assert linear.scales.dtype == torch.float16 and linear.bias.dtype == torch.bfloat16
    assert linear.forward(torch.ones(1, INNER, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_a_missing_weight_is_named():
    with pytest.raises(ValueError, match=r"neither mlp.up_proj.weight nor mlp.up_proj.qweight"):
        read_linear({}, "mlp.up_proj", device="cpu", dtype=torch.float32)
