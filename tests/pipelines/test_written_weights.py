"""Weight files under a progress bar, in the memory of one of them."""

import json
import os
import pty
import re
import subprocess
import sys
import termios
from pathlib import Path

import pytest
import torch

from engine.config import Recipe
from engine.models import names
from engine.models.families import model_config
from engine.storage.checkpoint import Checkpoint
from pipelines.quant.tensor_file import TensorFile
from pipelines.written_weights import keep_digests, link_weights, write_with_bar
from tests.pipelines.tiny_checkpoint import CONFIG, write_tiny_checkpoint

PEAK = """
import sys
from pathlib import Path
from engine.storage.checkpoint import Checkpoint
from pipelines.written_weights import write_with_bar

def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))

source, target = sys.argv[1:]
checkpoint = Checkpoint(Path(source), allow_quantized=True)
Path("/proc/self/clear_refs").write_text("5")
start = resident("VmRSS")
write_with_bar(Path(target), checkpoint.config, checkpoint.tensor, recipe=checkpoint.recipe, tp=2, title="weights")
print(resident("VmHWM") - start)
"""


def write_zeros(folder: Path) -> Path:
    """A checkpoint of 240 MB, 65 MB of them in one tensor."""
    shape = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4, "vocab_size": 32000}
    content = CONFIG | shape | {"num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 64}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(content))
    plan = {name: (torch.float16, size) for name, size in names.model_tensors(model_config(content)).items()}
    with TensorFile(folder / "model.safetensors", plan) as file:
        for name, (dtype, size) in plan.items():
            file.write(name, torch.zeros(size, dtype=dtype))
    return folder


def test_memory_is_that_of_one_file_and_a_few_blocks_and_a_terminal_sees_the_speed(tmp_path):
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (30, 100))
    command = [sys.executable, "-c", PEAK, str(write_zeros(tmp_path / "model")), str(tmp_path / "out")]
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=slave, text=True)
    os.close(slave)
    seen = os.read(master, 1 << 16).decode()
    os.close(master)
    peak, embedding = int(answer.stdout) * 1024, 2 * 32000 * 1024
    total = sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    assert total > 3.5 * embedding and peak < embedding + 48_000_000, (peak, total)
    assert re.search(r"weights: 100%.*\b(\d+)M/\1M .*\dMB/s", seen), seen


def test_where_there_is_no_terminal_nothing_is_said(tmp_path, capsys):
    checkpoint = Checkpoint(write_tiny_checkpoint(tmp_path / "model"))
    written = write_with_bar(tmp_path / "a", checkpoint.config, checkpoint.tensor, recipe=Recipe(), tp=1, title="x")
    assert capsys.readouterr().err == ""
    keep_digests(tmp_path / "a", written)
    linked = link_weights(tmp_path / "a", tmp_path / "b", within=Path("c/d"))
    assert [entry.path for entry in linked] == [f"c/d/{entry.path}" for entry in written]
    assert all((tmp_path / "b" / entry.path).stat().st_nlink == 2 for entry in linked)
    assert sorted(path.name for path in (tmp_path / "b/c/d").iterdir()) == sorted(entry.path for entry in written)


def test_a_model_that_does_not_fit_is_refused_before_the_bar(tmp_path):
    checkpoint = Checkpoint(write_tiny_checkpoint(tmp_path / "model"))
    with pytest.raises(ValueError, match="power of two, not 3"):
        write_with_bar(tmp_path / "a", checkpoint.config, checkpoint.tensor, recipe=Recipe(), tp=3, title="x")
    assert not (tmp_path / "a").exists()
