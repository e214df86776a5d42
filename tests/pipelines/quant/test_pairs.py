import torch

from pipelines.quant.pairs import divide_outputs, fold_heads, repeat_heads
from tests.engine.models.tiny import tiny_config


def test_folding_and_repeating_heads():
    """Query head h reads KV head h // 2: inputs 0-7 and 8-15 of o_proj come from V channels 0-7."""
    config = tiny_config()
    values = torch.arange(16.0)
    repeated = repeat_heads(values, config)
    assert repeated.view(4, 8)[0].equal(repeated.view(4, 8)[1]) and repeated.view(4, 8)[2, 0] == 8
    assert fold_heads(repeated, config).tolist() == [values.tolist()] * 2


def test_multi_head_attention_folds_to_itself():
    config, values = tiny_config(num_kv_heads=4), torch.arange(32.0)
    assert torch.equal(fold_heads(values, config)[0], values) and torch.equal(repeat_heads(values, config), values)


def test_outputs_are_rows_of_a_weight_and_elements_of_a_bias_or_norm():
    scale = torch.tensor([1.0, 2.0])
    tensors = {"v.weight": torch.ones(2, 3), "v.bias": torch.ones(2), "norm.weight": torch.ones(2)}
    assert divide_outputs(tensors, "v", scale)["v.weight"].tolist() == [[1.0] * 3, [0.5] * 3]
    assert divide_outputs(tensors, "v", scale)["v.bias"].tolist() == [1.0, 0.5]
    assert divide_outputs(tensors, "norm", scale)["norm.weight"].tolist() == [1.0, 0.5]
