"""The self-test of `ingot serve`: goldens of an evaluation, replayed before the first request."""

import json
from pathlib import Path

import pytest
import torch

from cli.main import main
from cli.target import Target, choose_goldens, find_target
from engine.config import EngineConfig, Recipe
from engine.runtime.engine import Engine
from engine.runtime.tokenizer import Tokenizer
from engine.storage.store import Store
from engine.storage.workspace import load_workspace
from pipelines.evaluation.goldens import record_goldens
from pipelines.toolchain import device_class
from server.config import ServeConfig, ServedModel
from tests.cli.test_serve import server
from tests.engine.storage.tiny_artifact import make_statement
from tests.tiny_artifact import write_tiny_artifact

PROMPTS = {"a": [0, 5, 6, 7], "b": [0, 200, 100, 50, 25]}


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, dict]:
    """A store with an artifact, its id, and the goldens of it."""
    root = tmp_path_factory.mktemp("stored")
    store = Store(root / "store")
    store.init(root / "cache")
    artifact_id = write_tiny_artifact(root / "tiny")
    store.put(root / "tiny")
    model = load_workspace(root / "tiny", device="cpu", dtype=torch.float32)
    tokenizer = Tokenizer(root / "tiny/triton_models/tokenizer")
    engine = Engine(model, tokenizer, EngineConfig(), session_len=64, kv_scales=None)
    device = device_class()
    goldens = record_goldens(engine, model, None, PROMPTS, artifact=artifact_id, recipe=Recipe(), device_class=device)
    return root, artifact_id, goldens


def evaluated(stored: tuple[Path, str, dict], content: object) -> list[str]:
    """Record an evaluation with these goldens; the arguments that serve the artifact."""
    root, artifact_id, _ = stored
    folder = make_statement(root / "statement", artifact_id, device=device_class())
    (folder / "goldens.json").write_text(json.dumps(content))
    Store(root / "store").put_statement(artifact_id, folder)
    return [f"artifact={artifact_id}", f"store={root / 'store'}"]


def deviating(goldens: dict) -> dict:
    first, *rest = goldens["prompts"]
    size, *products = first["logits"]
    return {**goldens, "prompts": [{**first, "logits": [size, *(value + size / 10 for value in products)]}, *rest]}


def test_what_was_recorded_is_replayed_before_the_url_is_said(stored: tuple[Path, str, dict]) -> None:
    with server(*evaluated(stored, stored[2]), "serve.session_len=64") as (process, _):
        process.terminate()
        assert "self-test passed: 2 of 2 goldens replayed\n" in process.communicate(timeout=30)[1]


def test_an_engine_that_computes_something_else_does_not_start(
    stored: tuple[Path, str, dict], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = evaluated(stored, deviating(stored[2]))
    assert main(["serve", "serve.port=0", *arguments]) == 1
    said = capsys.readouterr()
    assert "ingot: The self-test failed: 1 of 2 goldens are not what this engine computes. The logits after" in said.err
    assert "URL" not in said.out
    with server(*arguments, "waiver=known to differ") as (process, _):
        process.terminate()
        assert "self-test FAILED, and served on a waiver: 1 of 2 goldens" in process.communicate(timeout=30)[1]
    with server(*arguments, "serve.use_logn_attn=false") as (process, _):
        process.terminate()
        assert "self-test skipped: with serve.use_logn_attn this" in process.communicate(timeout=30)[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"artifact": "0" * 64}, "goldens of another artifact"),
        ({"prompts": [{}]}, "is damaged (KeyError('token_ids'))"),
    ],
)
def test_a_file_that_is_none_of_its_goldens_is_refused(
    stored: tuple[Path, str, dict], change: dict, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "serve.port=0", *evaluated(stored, {**stored[2], **change})]) == 1
    assert message in capsys.readouterr().err


def test_where_it_is_skipped(stored: tuple[Path, str, dict]) -> None:
    root, artifact_id, goldens = stored
    evaluated(stored, goldens)
    target = find_target(artifact=artifact_id, folder=None, waiver=None, store=str(root / "store"))
    assert choose_goldens(target, ServeConfig()) == (target.goldens, "")
    assert json.loads(target.goldens.read_text()) == goldens
    for config, why in (
        (ServeConfig(self_test=False), "serve.self_test is false"),
        (ServeConfig(quant_policy=0), "with serve.quant_policy this engine computes other numbers"),
        (ServeConfig(dtype="bfloat16"), "in float32, not for serve.device=cpu bfloat16"),
        (ServeConfig(device="cuda"), "not for serve.device=cuda auto"),
    ):
        chosen, said = choose_goldens(target, config)
        assert chosen is None
        assert why in said
    without = Target(folder=target.folder, model=target.model)
    assert "recorded goldens" in choose_goldens(without, ServeConfig())[1]
    assert "a plain folder" in choose_goldens(Target(folder=root, model=ServedModel(name="x")), ServeConfig())[1]
