"""Every family through the door: the logits of our engine are those of a model that is not ours, and a workspace of any
tp says the same again."""

import dataclasses

import pytest
import torch

from engine.config import Recipe
from engine.models.batch import packed
from engine.models.decoder import Decoder
from engine.storage.checkpoint import Checkpoint
from engine.storage.workspace import Workspace, load_workspace
from tests.engine.models.tiny import PagedRun
from tests.engine.storage.tiny_families import FAMILIES, PROMPT
from tests.engine.storage.tiny_workspace import check_cuts, make_workspace

TOLERANCE = 1e-4  # of the largest absolute logit
WHOLE = packed([PROMPT])


def distance(logits, expected):
    return float((logits - expected).abs().max() / expected.abs().max())


def model_of(checkpoint, **changes):
    config = dataclasses.replace(checkpoint.config, **changes)
    return Decoder(config, checkpoint.weights(), device="cpu", dtype=torch.float32)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_logits_are_those_of_the_familys_own_model(tmp_path, family):
    expected = family.write(tmp_path / "model", torch.float32)(PROMPT)
    checkpoint = Checkpoint(tmp_path / "model", allow_bin=family.allow_bin)
    model = model_of(checkpoint)
    assert distance(model(WHOLE, None), expected) <= TOLERANCE
    for name, value in family.matters.items():
        # Other numbers of the config must not pass for the same model.
        assert distance(model_of(checkpoint, **{name: value})(WHOLE, None), expected) > 100 * TOLERANCE


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_workspace_of_any_tp_gives_the_same_logits_and_is_cut_again_into_the_others(tmp_path, family):
    family.write(tmp_path / "model", torch.float16)
    checkpoint = Checkpoint(tmp_path / "model", allow_bin=family.allow_bin)
    expected = model_of(checkpoint)(WHOLE, None)
    for tp in (1, 2):
        folder = make_workspace(tmp_path / str(tp), checkpoint.config, Recipe(), tp, checkpoint.weights())
        config = checkpoint.config
        same = dataclasses.replace(
            config,
            family="llama",
            tie_word_embeddings=False,
            qkv_bias=config.qkv_bias or config.o_bias,
            o_bias=config.qkv_bias or config.o_bias,
        )
        assert Workspace(folder).config == same
        assert torch.equal(load_workspace(folder, device="cpu", dtype=torch.float32)(WHOLE, None), expected)
    check_cuts(tmp_path / "1", tmp_path / "2", tmp_path)


@pytest.mark.parametrize("name", ["mistral", "qwen-ntk", "qwen3", "llama-dynamic"])
def test_steps_through_the_paged_cache_are_the_whole_prompt(tmp_path, name):
    family = next(family for family in FAMILIES if family.name == name)
    expected = family.write(tmp_path / "model", torch.float32)(PROMPT)
    model = model_of(Checkpoint(tmp_path / "model"))
    # The base of the rotary embedding is that of the whole prompt from the first chunk on.
    run = PagedRun(model, [PROMPT, PROMPT[:7]], page_len=4, limits=[len(PROMPT), 7])
    for amounts in ({0: 11, 1: 3}, {0: 1, 1: 1}, {1: 3, 0: 12}, {0: 1}, {0: 15}):
        run.step(amounts)
    assert distance(run.result(0), expected) <= TOLERANCE


def test_the_table_has_every_architecture():
    from engine.models.families import FAMILIES as ROWS

    names = {family.name.partition("-")[0] for family in FAMILIES}
    assert {row.name for row in ROWS.values()} <= names
