"""Offline: a cache folder as huggingface_hub lays it out is made in the test."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub_cache(tmp_path):
    snapshot = tmp_path / "hub/models--org--tiny/snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (tmp_path / "hub/models--org--tiny/refs").mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (snapshot / name).write_text("{}")
    return tmp_path / "hub"


def ask(code, hub_cache):
    environment = {**os.environ, "HF_HUB_CACHE": str(hub_cache), "HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://[::1]:1"}
    command = [sys.executable, "-c", "from pipelines.hub import *\n" + code]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_a_commit_in_the_cache_is_found_without_a_connection(hub_cache):
    done = ask(
        f"print(cached('org/tiny', {COMMIT!r}) == fetch('org/tiny', {COMMIT!r}) == Path({str(hub_cache)!r})"
        f" / 'models--org--tiny/snapshots' / {COMMIT!r})",
        hub_cache,
    )
    assert done.stdout == "True\n", done.stderr


def test_a_commit_that_is_nowhere_is_one_clear_error(hub_cache):
    done = ask(
        f"print(cached('org/none', {COMMIT!r}))\ntry: fetch('org/none', {COMMIT!r})\n"
        "except FileNotFoundError as error: print(error)",
        hub_cache,
    )
    first, second = done.stdout.splitlines()
    assert first == "None"
    assert second.startswith("The hub repository org/none at 0123")
    assert "model.path" in second


def test_pickled_weights_count_only_where_they_may_be_read(hub_cache):
    weights = next(hub_cache.rglob("model.safetensors"))
    weights.rename(weights.with_name("pytorch_model.bin"))
    done = ask(f"print([bool(cached('org/tiny', {COMMIT!r}, allow_bin=x)) for x in (False, True)])", hub_cache)
    assert done.stdout == "[False, True]\n", done.stderr


def test_a_snapshot_without_a_model_is_refused(hub_cache):
    next(hub_cache.rglob("config.json")).unlink()
    done = ask(f"try: fetch('org/tiny', {COMMIT!r})\nexcept FileNotFoundError as error: print(error)", hub_cache)
    assert done.stdout.startswith("The hub repository org/tiny") or "no config.json" in done.stdout, done.stderr
