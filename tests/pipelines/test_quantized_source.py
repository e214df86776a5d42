import json

import pytest

from pipelines.quantized_source import check_weights
from tests.engine.storage.tiny_quantized import awq_config


def test_what_is_wrong_is_said_with_the_folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": awq_config(64)}))
    check_weights(tmp_path, "as_is")
    with pytest.raises(ValueError, match=f"^{tmp_path} is quantized already"):
        check_weights(tmp_path, "w4a16")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "hqq"}}))
    with pytest.raises(ValueError, match=f"^{tmp_path}: config.json has quantization_config.quant_method = 'hqq'"):
        check_weights(tmp_path, "as_is")


@pytest.mark.parametrize("content", ["{", "[]", None])
def test_a_config_that_cannot_be_read_is_left_to_the_reader(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    check_weights(tmp_path, "fp16")
