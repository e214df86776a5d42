"""Small TurboMind workspaces with random weights."""

import torch

from engine.config import ModelConfig
from engine.models import names
from engine.storage.config_ini import weight_type_of, write_config_ini
from engine.storage.head_files import head_tensors
from engine.storage.reshard import reshard
from engine.storage.workspace import WEIGHTS, write_weights

SMALL = ModelConfig(
    family="llama",
    vocab_size=37,
    hidden_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=96,
    norm_eps=1e-5,
    bos_token_id=1,
    eos_token_ids=(2,),
)


def random_tensors(config, recipe, seed=0):
    """Random canonical tensors of a model, quantized linears for w4a16 and w8a8."""
    random = torch.Generator().manual_seed(seed)
    dtype = torch.bfloat16 if config.dtype == "bfloat16" else torch.float16
    tensors = {}
    for name, shape in names.model_tensors(config).items():
        module = names.split_name(name)[1].removesuffix(".weight")
        if recipe.weights == "w4a16" and module in names.LINEARS:
            prefix, (outputs, inputs) = name.removesuffix("weight"), shape
            words = [(inputs, outputs // 8), (inputs // recipe.group_size, outputs // 8)]
            for kind, size in zip(("qweight", "qzeros"), words, strict=True):
                tensors[prefix + kind] = torch.randint(-(2**31), 2**31, size, generator=random).to(torch.int32)
            tensors[prefix + "scales"] = torch.rand((words[1][0], outputs), generator=random).to(torch.float16)
        elif recipe.weights == "w8a8" and module in names.LINEARS:
            tensors[name] = torch.randint(-128, 128, shape, generator=random).to(torch.int8)
            tensors[f"{name}_scale"] = torch.rand(shape[0], generator=random)
        else:
            tensors[name] = torch.randn(shape, generator=random).to(dtype)
    if recipe.head != "fp16":
        del tensors[names.HEAD]
    for name, (dtype, shape) in head_tensors(config, recipe).items():
        if dtype in (torch.int32, torch.int8):
            ends = torch.iinfo(dtype)
            tensors[name] = torch.randint(ends.min, ends.max + 1, shape, generator=random).to(dtype)
        else:
            tensors[name] = torch.rand(shape, generator=random).to(dtype)
    return tensors


def make_workspace(folder, config, recipe, tp, tensors):
    weights = folder / WEIGHTS
    write_weights(weights, config, tensors.__getitem__, recipe=recipe, tp=tp)
    write_config_ini(
        weights / "config.ini",
        config,
        model_name="x",
        recipe=recipe,
        tp=tp,
        session_len=64,
        weight_type=weight_type_of(config, recipe),
    )
    return folder


def check_cuts(one, two, folder):
    """The weights of `one` (tp=1), cut for two ranks, are the files of `two`, and back."""
    for source, target, tp in ((one, two, 2), (two, one, 1)):
        reshard(source, folder / f"cut{tp}", tp)
        found, expected = (
            {path.name: path.read_bytes() for path in (place / WEIGHTS).iterdir()}
            for place in (folder / f"cut{tp}", target)
        )
        assert found == expected
