import pytest
import torch
from safetensors.torch import load_file, save_file

from pipelines.quant.tensor_file import TensorFile, tensors_over


def planned(tensors):
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


@pytest.fixture
def tensors():
    return {
        "b": torch.arange(12, dtype=torch.int32).view(3, 4),
        "a": torch.randn(5).half(),
        "c": torch.randn(2, 2, 2),
        "d": torch.randn(3).bfloat16(),
    }


def test_what_is_written_is_read(tmp_path, tensors):
    with TensorFile(tmp_path / "x.safetensors", planned(tensors)) as file:
        for name in ("c", "a", "d", "b"):
            file.write(name, tensors[name])
    loaded = load_file(tmp_path / "x.safetensors")
    assert set(loaded) == set(tensors) and all(torch.equal(loaded[name], x) for name, x in tensors.items())


def test_bytes_do_not_depend_on_the_order(tmp_path, tensors):
    for path, order in ((tmp_path / "1", list(tensors)), (tmp_path / "2", sorted(tensors))):
        with TensorFile(path, {name: planned(tensors)[name] for name in order}) as file:
            for name in order:
                file.write(name, tensors[name])
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


def test_other_shapes_and_missing_tensors_are_errors(tmp_path, tensors):
    with (
        pytest.raises(ValueError, match=r"a is torch.float32 \(5,\); announced was torch.float16"),
        TensorFile(tmp_path / "1", planned(tensors)) as file,
    ):
        file.write("a", torch.zeros(5))
    with pytest.raises(ValueError, match="lacks b, c, d"), TensorFile(tmp_path / "2", planned(tensors)) as file:
        file.write("a", tensors["a"])


def test_tensors_over(tmp_path, tensors):
    save_file({"a": tensors["a"]}, tmp_path / "over.safetensors")
    read = tensors_over(tmp_path / "over.safetensors", lambda name: torch.zeros(1))
    assert torch.equal(read("a"), tensors["a"]) and torch.equal(read("z"), torch.zeros(1))
    assert torch.equal(tensors_over(tmp_path / "absent", lambda name: torch.ones(1))("a"), torch.ones(1))
