from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import rows
from benchmarks.peers import PeerOptions, run_peer
from benchmarks.random_checkpoint import write_checkpoint
from benchmarks.random_weights import RandomWeights
from benchmarks.shapes import shape
from benchmarks.subject import Subject
from benchmarks.workload import fixed
from cli.main import main
from engine.config import Recipe
from engine.runtime.tokenizer import Tokenizer
from engine.storage.checkpoint import Checkpoint

TINY = shape("tiny")


@pytest.mark.parametrize("recipe", [Recipe(), Recipe(weights="w8a8"), Recipe(weights="w4a16", group_size=64)], ids=str)
def test_a_checkpoint_holds_the_weights_that_our_engine_gets(recipe: Recipe, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, TINY, recipe, seed=4)
    made = RandomWeights(TINY, recipe, device="cpu", seed=4)
    stored = Checkpoint(tmp_path, allow_quantized=True)
    assert replace(stored.config, family=TINY.family) == TINY
    assert stored.recipe.weights == recipe.weights
    assert all(torch.equal(stored.tensor(name), made[name]) for name in made)
    assert Tokenizer(tmp_path).vocab_size == TINY.vocab_size


def test_weights_without_a_form_of_checkpoint_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="random w4a16-int8head weights cannot be written"):
        write_checkpoint(tmp_path / "c", TINY, Recipe(weights="w4a16", group_size=64, head="int8"))
    assert not (tmp_path / "c").exists()


def test_transformers_runs_the_same_case_into_the_same_columns(tmp_path: Path) -> None:
    out = tmp_path / "rows.csv"
    case = ["bench", "generation", "shape=tiny", "device=cpu", "batch=3", "input=4", "output=6", f"out={out}"]
    assert main(case) == 0
    assert main([*case, "peer=hf"]) == 0
    ours, theirs = rows.read(out)
    assert (ours["engine"], theirs["engine"].split()[0]) == ("ingot", "transformers")
    assert ours.keys() == theirs.keys()
    for row in (ours, theirs):
        assert float(row["tokens_per_second"]) == pytest.approx(18 / float(row["seconds"]), rel=0.01)
        assert float(row["first_token_ms"]) > 0
        assert float(row["step_ms"]) > 0


def test_a_peer_that_fails_is_said_in_its_words() -> None:
    subject = Subject(name="tiny", config=TINY, recipe=Recipe(), tp=1, device="cpu", dtype=torch.float32, seed=0)
    beyond = [fixed(1, 9, 2, vocab_size=10**6, seed=0)]
    with pytest.raises(ValueError, match=r"hf ended with exit code 1 before it had answered: IndexError"):
        run_peer(PeerOptions(peer="hf"), subject, beyond, at_once=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["peer=vllm"], "peer=vllm needs a GPU; on a CPU there is peer=hf"),
        (["peer=hf", "kv=kv8"], "peer=hf is not run with kv=kv8; it is with kv16"),
        (["peer=hf", "weights=w4a16", "group_size=64"], "not run with weights=w4a16; it is with fp16"),
        (["peer=hf", "python=/nowhere/python"], "python=/nowhere/python cannot be started"),
        (["peer=tgi"], "peer is 'tgi', but must be one of hf, vllm, lmdeploy"),
    ],
)
def test_a_mistake_is_one_paragraph(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "throughput", "shape=tiny", "device=cpu", *arguments, "out=none"]) == 1
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
