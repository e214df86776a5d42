import json

import pytest
import torch

from engine.storage.checkpoint import Checkpoint
from tests.engine.storage.tiny_families import meta


@pytest.fixture
def folder(tmp_path):
    meta(ranks=2)(tmp_path / "model", torch.float16)
    return tmp_path / "model"


def edited(folder, **changes):
    path = folder / "params.json"
    params = {name: value for name, value in (json.loads(path.read_text()) | changes).items() if value != "absent"}
    path.write_text(json.dumps(params))
    return folder


def refused(folder, words, **options):
    with pytest.raises((ValueError, FileNotFoundError), match=words) as caught:
        Checkpoint(folder, **({"allow_bin": True} | options))
    assert "\n" not in str(caught.value)


def test_what_params_json_says(folder):
    checkpoint = Checkpoint(folder, allow_bin=True)
    config = checkpoint.config
    assert (config.family, config.rope_theta, config.dtype, config.norm_eps) == ("llama", 1e6, "float16", 1e-5)
    assert (config.vocab_size, config.intermediate_size, config.num_kv_heads, config.head_dim) == (70, 40, 2, 16)
    assert [path.name for path in checkpoint.files] == ["consolidated.00.pth", "consolidated.01.pth", "params.json"]
    scaled = Checkpoint(edited(folder, use_scaled_rope=True, rope_scaling_factor=32), allow_bin=True).config
    assert (scaled.rope_scaling.kind, scaled.rope_scaling.factor) == ("llama3", 32)
    window = Checkpoint(edited(folder, use_scaled_rope=False, sliding_window=9), allow_bin=True).config
    assert (window.family, window.sliding_window, window.rope_scaling) == ("mistral", 9, None)


def test_pickled_weights_have_to_be_allowed(folder):
    refused(folder, r"consolidated\.00\.pth holds pickled weights.*model\.allow_bin=true", allow_bin=False)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dim": "absent"}, "params.json has dim = None"),
        ({"n_heads": "absent"}, "num_attention_heads = None"),
        ({"vocab_size": 71}, r"params\.json has vocab_size = 71, but the weights have 70"),
        ({"hidden_dim": 41}, "hidden_dim = 41, but the weights have 40"),
        ({"moe": {"num_experts": 8}}, "params.json has moe = .*does not know"),
        ({"use_scaled_rope": True}, "use_scaled_rope without rope_scaling_factor"),
        ({"n_layers": 3}, r"consolidated\.00\.pth has no tensor layers\.2\."),
        ({"dim": 32}, "consolidated"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(folder, changes, words):
    refused(edited(folder, **changes), words)


def test_ranks_that_do_not_fit_each_other(folder):
    path = folder / "consolidated.01.pth"
    tensors = torch.load(path)
    tensors["norm.weight"] = torch.ones(3)
    torch.save(tensors, path)
    refused(folder, r"consolidated\.01\.pth does not hold the same names and shapes")
    path.unlink()
    refused(folder, "vocab_size|shape")
    (folder / "consolidated.00.pth").unlink()
    refused(folder, r"params\.json but none of consolidated\*\.pth")
