import torch
from transformers import LlamaConfig, LlamaForCausalLM

from engine.models import names
from engine.models.names import Shard
from tests.engine.models.tiny import tiny_config


def test_names_and_shapes_are_those_of_transformers():
    for config in (tiny_config(), tiny_config(qkv_bias=True, o_bias=True, num_heads=8, head_dim=10)):
        with torch.device("meta"):
            model = LlamaForCausalLM(
                LlamaConfig(
                    vocab_size=config.vocab_size,
                    hidden_size=config.hidden_size,
                    intermediate_size=config.intermediate_size,
                    num_hidden_layers=config.num_layers,
                    num_attention_heads=config.num_heads,
                    num_key_value_heads=config.num_kv_heads,
                    head_dim=config.head_dim,
                    attention_bias=config.qkv_bias,
                )
            )
        expected = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
        assert names.model_tensors(config) == expected


def test_split_name_reads_layer_name_backwards():
    for name in names.model_tensors(tiny_config(num_layers=12)):
        layer, rest = names.split_name(name)
        assert (name if layer is None else names.layer_name(layer, rest)) == name
        assert (layer is None) == (not name.startswith("model.layers."))
    assert names.split_name("model.layers.x.mlp") == (None, "model.layers.x.mlp")


def test_every_module_of_a_layer_has_a_cut_that_fits_its_neighbour():
    config = tiny_config(qkv_bias=True, o_bias=True, qk_norm=True)
    assert {name.rpartition(".")[0] for name in names.layer_tensors(config)} == set(names.LAYER_SHARDS)
    assert [module for module, cut in names.LAYER_SHARDS.items() if cut is Shard.REPLICATED] == [
        names.NORMS[0],
        *names.HEAD_NORMS,
        names.NORMS[1],
    ]
    assert {*names.LINEARS, *names.NORMS, *names.HEAD_NORMS} == set(names.LAYER_SHARDS)
    # The outputs of a COLUMN cut are the inputs of the ROW cut behind it.
    for first, second in (("self_attn.q_proj", "self_attn.o_proj"), ("mlp.up_proj", "mlp.down_proj")):
        assert (names.LAYER_SHARDS[first], names.LAYER_SHARDS[second]) == (Shard.COLUMN, Shard.ROW)
        assert names.linear_shape(config, first)[0] == names.linear_shape(config, second)[1]
