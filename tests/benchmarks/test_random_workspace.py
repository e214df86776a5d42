from pathlib import Path

import pytest
import torch

from benchmarks.random_weights import RandomWeights
from benchmarks.random_workspace import write_tokenizer, write_workspace
from benchmarks.shapes import shape
from engine.config import EngineConfig, Recipe, Sampling
from engine.models.decoder import Decoder
from engine.runtime.engine import Engine
from engine.runtime.tokenizer import Tokenizer
from engine.storage.artifacts import verify
from engine.storage.workspace import Workspace

TINY = shape("tiny")


@pytest.mark.parametrize(
    ("recipe", "tp"),
    [
        (Recipe(), 1),
        (Recipe(weights="w8a8"), 1),
        (Recipe(weights="w4a16", group_size=32, head="int8"), 1),
        (Recipe(weights="w4a16", kv="kv8", group_size=64), 1),
        (Recipe(kv="kv8"), 2),
        (Recipe(kv="kv8", kv_granularity="channel"), 1),
        (Recipe(kv="kv8", kv_granularity="token"), 1),
    ],
    ids=str,
)
def test_a_workspace_is_whole_and_holds_the_weights_of_its_seed(recipe: Recipe, tp: int, tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    artifact_id = write_workspace(folder, "tiny", TINY, recipe, tp=tp, seed=5)
    assert verify(folder).id == artifact_id
    stored = Workspace(folder)
    made = RandomWeights(TINY, recipe, device="cpu", seed=5)
    assert all(torch.equal(stored.tensor(name), made[name]) for name in made)
    engine = Engine.from_workspace(folder, EngineConfig(session_len=64))
    [answer] = engine.generate([[5, 6, 7]], Sampling(max_new_tokens=8, temperature=0.0, ignore_eos=True))
    assert len(answer.token_ids) == 8
    if recipe.kv == "kv16":
        model = Decoder(TINY, made, device="cpu", dtype=torch.float32)
        other = Engine(model, Tokenizer(stored.tokenizer_folder), EngineConfig(), session_len=64)
        [same] = other.generate([[5, 6, 7]], Sampling(max_new_tokens=8, temperature=0.0, ignore_eos=True))
        assert same.token_ids == answer.token_ids


def test_a_folder_that_exists_is_left_alone(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="exists already"):
        write_workspace(tmp_path, "tiny", TINY, Recipe())
    assert not list(tmp_path.iterdir())


def test_every_text_is_encoded_and_comes_back(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, 1000)
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.vocab_size == 1000
    text = "Grüße, 世界 👋\x00\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode(text)) == len(text.encode())
    assert tokenizer.eos_token_ids == (2,)
    assert tokenizer.decode([1, 900, 901]) == " w641 w642"
    assert tokenizer.encode_chat([{"role": "user", "content": "a"}])[0] == 1
    with pytest.raises(ValueError, match="at least 259"):
        write_tokenizer(tmp_path, 100)
