import numpy as np
import pytest

from benchmarks.bundled_model import read_gguf
from benchmarks.random_gguf import write_gguf
from benchmarks.shapes import shape


def test_a_gguf_file_is_read_with_the_sizes_and_the_variance_of_the_shape(tmp_path):
    write_gguf(tmp_path / "model.gguf", shape("tiny"), "Q8_0")
    fields, tensors = read_gguf((tmp_path / "model.gguf").read_bytes())
    assert fields["llama.block_count"] == 2 and fields["llama.vocab_size"] == 512
    assert tensors["blk.1.ffn_down.weight"].shape == (128, 256)
    assert np.isclose(tensors["blk.1.ffn_down.weight"].std(), 256**-0.5, rtol=0.02)
    assert (tensors["output_norm.weight"] == 1).all()


def test_models_that_are_no_plain_llama_are_not_written(tmp_path):
    with pytest.raises(ValueError, match="family qwen2"):
        write_gguf(tmp_path / "model.gguf", shape("qwen2_5_7b"), "Q4_0")
    assert not list(tmp_path.iterdir())
