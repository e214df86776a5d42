import json

import pytest
import torch

from pipelines.quant import resume
from pipelines.quant.resume import LayerResult, Resume
from pipelines.quant.tensor_file import KINDS

LAYERS = 6


class Sum:
    """A state that every layer changes, so that a layer that is done twice or not at all is seen."""

    def __init__(self):
        self.tensor = torch.zeros(3, dtype=torch.bfloat16)
        self.computed = []

    def state(self):
        return {"sum": self.tensor}

    def restore(self, read):
        self.tensor = read("sum")

    def compute(self, number):
        self.computed.append(number)
        self.tensor = self.tensor * 2 + number
        return LayerResult(tensors={"x/y": self.tensor.float() + 1}, rows=[{"error": number / 3}])


@pytest.fixture(autouse=True)
def always(monkeypatch):
    monkeypatch.setattr(resume, "SHARE", 1e9)


def run(folder, *, stop=LAYERS):
    """The state and the results of a run that ends before layer `stop`."""
    state, results = Sum(), []
    for number, result in Resume(folder, count=LAYERS, state=state).results(state.compute):
        assert number == len(results)
        results.append((result.tensors["x/y"].tolist(), result.rows))
        if number + 1 == stop:
            break
    return state, results


WHOLE = run(None)[1]


@pytest.mark.parametrize("stop", range(1, LAYERS))
def test_it_goes_on_with_the_next_layer(tmp_path, stop, capsys):
    run(tmp_path, stop=stop)
    assert len(list(tmp_path.glob("*.state.safetensors"))) == 1
    state, results = run(tmp_path)
    assert state.computed == list(range(stop, LAYERS)) and results == WHOLE
    assert f"resume: {stop} of {LAYERS} layers were done before" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["00003.state.safetensors", "00001.results.safetensors", "00002.json"])
@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
def test_what_is_damaged_is_not_used(tmp_path, name, damage, capsys):
    run(tmp_path, stop=4)
    path, content = tmp_path / name, bytearray((tmp_path / name).read_bytes())
    content[-1] ^= 1
    path.unlink()
    if damage != "gone":
        path.write_bytes(content if damage == "flipped" else content[:-3])
    state, results = run(tmp_path)
    assert state.computed == list(range(LAYERS)) and results == WHOLE
    assert "is not whole" in capsys.readouterr().err


def test_a_run_killed_while_it_writes_goes_on_from_what_was_whole_before(tmp_path, capsys):
    run(tmp_path, stop=3)
    for name in ("00003.results.safetensors", "00003.state.safetensors", "00003.tmp"):
        (tmp_path / name).write_bytes(b"half")
    state, results = run(tmp_path)
    assert state.computed == [3, 4, 5] and results == WHOLE
    assert "not whole" not in capsys.readouterr().err


def test_quick_layers_are_kept_several_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(resume, "SHARE", 0.1)
    clock = iter(range(10_000))
    monkeypatch.setattr(resume.time, "monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(resume, "EXPECTED_RATE", 1.0)  # bytes a second: 18 a layer take 180 s to be worth it
    run(tmp_path, stop=5)
    assert not list(tmp_path.glob("*.json"))
    assert len(list(tmp_path.glob("*.results.safetensors"))) == 5
    state, results = run(tmp_path)
    assert state.computed == list(range(LAYERS)) and results == WHOLE


def test_results_without_a_record_and_then_one_for_all(tmp_path, monkeypatch):
    monkeypatch.setattr(resume, "SHARE", 1e-9)
    state = Sum()
    for number, _ in Resume(tmp_path, count=LAYERS, state=state).results(state.compute):
        if number == 2:
            resume.SHARE = 1e9
        if number == 3:
            break
    assert list(json.loads((tmp_path / "00003.json").read_text())["rows"]) == ["0", "1", "2", "3"]
    state, results = run(tmp_path)
    assert state.computed == [4, 5] and results == WHOLE


def test_a_full_disk_stops_no_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(resume.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 0}))
    state, results = run(tmp_path / "unfinished")
    assert results == WHOLE and state.computed == list(range(LAYERS))
    assert "nothing is kept any more" in capsys.readouterr().err


def test_without_a_folder_nothing_is_kept(tmp_path):
    assert run(None) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", KINDS)
def test_tensors_come_back_bit_by_bit(tmp_path, dtype):
    bits = torch.randint(0, 255, (4, 6), dtype=torch.uint8).view(dtype) if dtype.itemsize <= 2 else None
    tensor = torch.arange(6).to(dtype) if bits is None else bits
    for _ in range(2):
        layers = Resume(tmp_path, count=2).results(lambda number: LayerResult(tensors={"t": tensor}))
        kept = next(layers)[1].tensors["t"]
        assert kept.dtype == dtype and torch.equal(kept.view(torch.uint8), tensor.view(torch.uint8))
        next(layers)
