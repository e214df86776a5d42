import pytest

from engine.models.quantization import Quantization, check_source, read_quantization, unquantized
from tests.engine.storage.tiny_quantized import awq_config, int8_config, packed_config, scheme


def said(value, field="quantization_config"):
    return read_quantization({"hidden_size": 64, field: value})


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (awq_config(64), Quantization(method="awq", group_size=64)),
        (awq_config(64, version="GEMM", modules_to_not_convert=None), Quantization(method="awq", group_size=64)),
        ({"quant_method": "awq", "w_bit": 4, "q_group_size": 128}, Quantization(method="awq", group_size=128)),
        (packed_config(32), Quantization(method="compressed-tensors", group_size=32)),
        (packed_config(32, symmetric=True), Quantization(method="compressed-tensors", group_size=32, symmetric=True)),
        (packed_config(32, weights={"actorder": "weight"}), Quantization(method="compressed-tensors", group_size=32)),
        (None, None),
        ({}, None),
    ],
)
def test_what_is_read(value, expected):
    assert said(value) == expected
    assert unquantized({"hidden_size": 64, "quantization_config": value}) == {"hidden_size": 64}


def test_the_older_field_of_compressed_tensors():
    assert said(packed_config(32), "compression_config") == Quantization(method="compressed-tensors", group_size=32)


@pytest.mark.parametrize(
    "method",
    [
        "gptq",
        "bitsandbytes",
        "fp8",
        "fbgemm_fp8",
        "eetq",
        "hqq",
        "quanto",
        "aqlm",
        "torchao",
        "bitnet",
        "auto-round",
        None,
    ],
)
def test_other_methods_are_refused_by_name(method):
    with pytest.raises(ValueError, match=rf"quantization_config\.quant_method = {method!r}, .*awq \(GEMM, 4 bits\)"):
        said({"quant_method": method, "bits": 4, "group_size": 128})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (awq_config(128, bits=8), r"quantization_config\.bits = 8, .*may be 4"),
        (awq_config(128, version="gemv"), r"\.version = 'gemv'"),
        (awq_config(128, zero_point=False), r"\.zero_point = False"),
        (awq_config(-1), r"\.group_size = -1, .*a whole number"),
        (awq_config(128, rotate=True), r"\.rotate = True.*not known"),
        (packed_config(128, format="int-quantized"), r"input_activations = None, .*8-bit activations alone"),
        (packed_config(128, format="naive-quantized"), r"\.format = 'naive-quantized'.*or 'int-quantized'"),
        (int8_config(input_activations=None), r"group_0\.input_activations = None, .*8-bit activations alone"),
        (int8_config(output_activations={"num_bits": 8}), r"group_0\.output_activations = "),
        (int8_config(weights=scheme("tensor")), r"group_0\.weights\.strategy = 'tensor'.*may be 'channel'"),
        (int8_config(weights=scheme("channel", num_bits=4)), r"group_0\.weights\.num_bits = 4"),
        (int8_config(weights=scheme("channel", symmetric=False)), r"group_0\.weights\.symmetric = False"),
        (int8_config(weights=scheme("channel", type="float")), r"group_0\.weights\.type = 'float'"),
        (int8_config(weights={"type": "int"}), r"group_0\.weights\.num_bits = None"),
        (int8_config(input_activations=scheme("tensor")), r"group_0\.input_activations\.strategy = 'tensor'"),
        (int8_config(input_activations=scheme("token")), r"group_0\.input_activations\.dynamic = False.*may be True"),
        (int8_config(surprise=1), r"group_0\.surprise = 1.*not known"),
        ({"quant_method": "smooth_quant", "quant_dtype": "float8_e4m3fn"}, r"quant_dtype = 'float8_e4m3fn'"),
        (
            packed_config(128, format="float-quantized"),
            r"\.format = 'float-quantized'.* or 'int-quantized'",
        ),
        (packed_config(128, format="marlin-24"), r"\.format = 'marlin-24'"),
        (packed_config(128, quantization_status="frozen"), r"\.quantization_status = 'frozen'"),
        (packed_config(128, kv_cache_scheme={"num_bits": 8}), r"\.kv_cache_scheme = "),
        (packed_config(128, sparsity_config={"format": "sparse-24-bitmask"}), r"\.sparsity_config = "),
        (packed_config(128, transform_config={"config_groups": {}}), r"\.transform_config = "),
        (packed_config(128, weights={"num_bits": 8}), r"group_0\.weights\.num_bits = 8"),
        (packed_config(128, weights={"type": "float"}), r"group_0\.weights\.type = 'float'"),
        (packed_config(None, weights={"strategy": "channel"}), r"group_0\.weights\.strategy = 'channel'"),
        (packed_config(None), r"group_0\.weights\.group_size = None"),
        (packed_config(128, weights={"symmetric": "no"}), r"weights\.symmetric = 'no'"),
        (packed_config(128, config_groups={}), r"\.config_groups = \{\}"),
        (packed_config(128, config_groups={"W4A16": ["Linear"]}), r"\.config_groups\.W4A16 = \['Linear'\]"),
        ("awq", r"quantization_config = 'awq', .*an object with `quant_method`"),
    ],
)
def test_what_would_change_the_numbers_is_refused_by_field_and_value(value, message):
    with pytest.raises(ValueError, match=message):
        said(value)


def test_eight_bits_are_read_in_both_forms():
    for config in (
        int8_config(),
        {"quant_method": "smooth_quant"},
        {"quant_method": "smooth_quant", "quant_dtype": "int8"},
    ):
        found = said(config)
        assert found.int8 and found.symmetric and str(found) == f"{config['quant_method']}, 8 bits, a scale a row"
    check_source({"quantization_config": int8_config()}, "as_is", "x")
    with pytest.raises(ValueError, match=r"x is quantized already .*8 bits.*weights=w8a8 starts from unquantized"):
        check_source({"quantization_config": int8_config()}, "w8a8", "x")


def test_groups_of_two_kinds_and_activations_are_refused():
    two = packed_config(128)
    groups = {"a": two["config_groups"]["group_0"], "b": packed_config(64)["config_groups"]["group_0"]}
    with pytest.raises(ValueError, match=r"config_groups = \['a', 'b'\], .*all quantized alike"):
        said(two | {"config_groups": groups})
    activations = groups["a"] | {"input_activations": {"num_bits": 8}}
    with pytest.raises(ValueError, match=r"config_groups\.a\.input_activations = "):
        said(two | {"config_groups": {"a": activations}})


def test_weights_and_source_go_together():
    quantized, dense = {"quantization_config": awq_config(128)}, {}
    check_source(quantized, "as_is", "x")
    check_source(dense, "w4a16", "x")
    with pytest.raises(ValueError, match=r"^x is quantized already \(awq, 4 .*128\), and weights=fp16 .*weights=as_is"):
        check_source(quantized, "fp16", "x")
    with pytest.raises(ValueError, match=r"^x is not quantized .*weights=as_is takes over"):
        check_source(dense, "as_is", "x")
