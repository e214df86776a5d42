import pytest
import torch

from engine.models.batch import packed
from engine.storage.checkpoint import Checkpoint, load_checkpoint
from pipelines.quant.observers import Observer, channel_statistics, head_statistics
from pipelines.quant.stream import LayerTensors, Stream, side_by_side
from tests.pipelines.tiny_checkpoint import write_tiny_checkpoint

BLOCKS = torch.randint(0, 200, (5, 24), generator=torch.Generator().manual_seed(0), dtype=torch.int32)


def observer():
    return Observer(of_input=channel_statistics, of_kv=head_statistics)


def walk(checkpoint, workers):
    stream = Stream(checkpoint, BLOCKS, workers)
    seen = []
    for number in range(checkpoint.config.num_layers):
        layer = stream.dense(LayerTensors(checkpoint, number))
        seen.append(stream.observe(layer, number, observer, advance=True))
    return stream, seen


def test_streaming_is_the_model_itself(tmp_path):
    checkpoint = Checkpoint(write_tiny_checkpoint(tmp_path / "model"))
    model = load_checkpoint(checkpoint.folder)
    with side_by_side(2) as workers, torch.inference_mode():
        stream, _ = walk(checkpoint, workers)
        expected = torch.stack([model(packed([row.tolist()]), None) for row in BLOCKS])
        logits = torch.stack([model.head(hidden) for hidden in stream.hidden])
    torch.testing.assert_close(logits, expected)


def test_the_number_of_workers_and_threads_changes_no_bit(tmp_path):
    checkpoint = Checkpoint(write_tiny_checkpoint(tmp_path / "model"))
    results = []
    before = torch.get_num_threads()
    for workers_count, threads in ((1, 1), (2, 2), (3, 1)):
        torch.set_num_threads(threads)
        with side_by_side(workers_count) as workers:
            assert torch.get_num_threads() == 1
            results.append(walk(checkpoint, workers))
        assert torch.get_num_threads() == threads
    torch.set_num_threads(before)
    for stream, seen in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(stream.hidden, results[0][0].hidden, strict=True))
        for layer, expected in zip(seen, results[0][1], strict=True):
            for module, statistics in layer.items():
                assert all(torch.equal(statistics[name], expected[module][name]) for name in statistics)


def test_observing_without_advancing_leaves_the_stream_where_it_is(tmp_path):
    checkpoint = Checkpoint(write_tiny_checkpoint(tmp_path / "model"))
    with side_by_side(1) as workers:
        stream = Stream(checkpoint, BLOCKS, workers)
        before = [hidden.clone() for hidden in stream.hidden]
        layer = stream.dense(LayerTensors(checkpoint, 0))
        stream.observe(layer, 0, observer, advance=False)
        assert all(torch.equal(a, b) for a, b in zip(stream.hidden, before, strict=True))
        stream.advance(layer)
        assert not torch.equal(stream.hidden[0], before[0])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_weight_is_named(tmp_path, bad):
    name = "model.layers.1.mlp.up_proj.weight"
    weight = torch.zeros(96, 64)
    weight[5, 7] = bad
    checkpoint = Checkpoint(write_tiny_checkpoint(tmp_path / "model", replace={name: weight}))
    assert len(dict(LayerTensors(checkpoint, 0))) == 9
    with pytest.raises(ValueError, match=rf"{name} of .* has NaN or Inf"):
        dict(LayerTensors(checkpoint, 1))


def test_an_activation_that_overflows_is_named(tmp_path):
    huge = {"model.layers.0.mlp.up_proj.weight": torch.full((96, 64), 1e37)}
    huge["model.layers.0.mlp.gate_proj.weight"] = torch.full((96, 64), 1e37)
    checkpoint = Checkpoint(write_tiny_checkpoint(tmp_path / "model", dtype=torch.float32, replace=huge))
    with (
        side_by_side(1) as workers,
        pytest.raises(ValueError, match=r"Layer 0: the input of mlp.down_proj has NaN or Inf .* sample 0"),
    ):
        walk(checkpoint, workers)


def test_ids_of_another_vocabulary_are_refused(tmp_path):
    checkpoint = Checkpoint(write_tiny_checkpoint(tmp_path / "model"))
    with side_by_side(1) as workers, pytest.raises(ValueError, match="its tokenizer does not belong"):
        Stream(checkpoint, torch.full((1, 4), 5000), workers)
