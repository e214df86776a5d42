import pytest
import torch

from engine.storage.lazy_tensors import LazyTensors


def test_tensors_are_read_when_they_are_asked_for():
    read = []

    def make(name):
        read.append(name)
        return torch.ones(1)

    tensors = LazyTensors(["a", "b"], make)
    assert (list(tensors), len(tensors), "b" in tensors, "c" in tensors, read) == (["a", "b"], 2, True, False, [])
    assert torch.equal(tensors["b"], torch.ones(1))
    assert read == ["b"]
    with pytest.raises(KeyError):
        tensors["c"]
