import pytest

from benchmarks.tune import products
from cli.main import main


def test_the_products_of_a_shape() -> None:
    assert products("internlm7b") == [(12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008), (103168, 4096)]
    assert products("llama3_8b")[0] == (6144, 4096)


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "tune", "device=cpu"]) == 1
    assert "kernels are tuned on a GPU" in capsys.readouterr().err
    assert main(["bench", "tune", "device=cuda:99"]) == 1
    assert "device=cuda:99 is not on this machine" in capsys.readouterr().err
    assert products("internlm7b", 2) == [(6144, 4096), (4096, 2048), (11008, 4096), (4096, 5504), (51584, 4096)]
    assert products("llama3_8b", 4)[0] == (1536, 4096)
    with pytest.raises(ValueError, match="tp"):
        products("internlm7b", 64)
