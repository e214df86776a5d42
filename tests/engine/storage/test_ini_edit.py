from pathlib import Path

import pytest

from engine.config import Recipe
from engine.storage.config_ini import read_config_ini, write_config_ini
from engine.storage.ini_edit import write_with_value
from tests.engine.storage.tiny_workspace import SMALL


@pytest.fixture
def ini(tmp_path: Path) -> Path:
    path = tmp_path / "config.ini"
    options = {"model_name": "x", "recipe": Recipe(), "tp": 1, "session_len": 64, "weight_type": "fp16"}
    write_config_ini(path, SMALL, **options)
    return path


def test_one_value_changes_and_every_other_byte_stays(tmp_path: Path, ini: Path) -> None:
    before, linked = ini.read_text(), tmp_path / "linked.ini"
    linked.hardlink_to(ini)
    write_with_value(ini, ini, "quant_policy", 4)
    assert ini.read_text() == before.replace("quant_policy = 0", "quant_policy = 4")
    assert linked.read_text() == before, "what was linked is another file now"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.ini", "linked.ini"]


def test_a_key_that_an_old_file_lacks_comes_first(tmp_path: Path, ini: Path) -> None:
    old = "".join(
        line
        for line in ini.read_text().splitlines(keepends=True)
        if not line.startswith(("tensor_para_size", "cache_block_seq_len"))
    )
    ini.write_text(old)
    write_with_value(ini, tmp_path / "two.ini", "tensor_para_size", 2)
    assert (tmp_path / "two.ini").read_text() == old.replace("[llama]\n", "[llama]\ntensor_para_size = 2\n")
    assert read_config_ini(tmp_path / "two.ini").tensor_para_size == 2


@pytest.mark.parametrize(
    ("text", "key", "value", "words"),
    [
        (None, "tensor_para_size", 3, "tensor_para_size = 3 is out of range"),
        (None, "no_such_key", 1, "unknown key no_such_key"),
        ("nothing\n", "tensor_para_size", 2, "is no config.ini"),
    ],
)
def test_what_is_wrong_writes_nothing(ini: Path, text: str | None, key: str, value: int, words: str) -> None:
    if text is not None:
        ini.write_text(text)
    before = ini.read_text()
    with pytest.raises(ValueError, match=words):
        write_with_value(ini, ini, key, value)
    assert ini.read_text() == before and [path.name for path in ini.parent.iterdir()] == ["config.ini"]
