"""One server for all tests here, and one with more room for those that tell a model of tools."""

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from engine.config import EngineConfig
from pipelines.convert import Conversion, convert
from tests.server.running import KEY, Served, serving
from tests.tiny_artifact import write_tiny_artifact

DEMO = Path(__file__).resolve().parents[2] / "demo" / "model"
CONFIG = EngineConfig(max_batch_size=8, num_tokens_per_iter=64, cache_max_entry_count=300, cache_block_seq_len=16)
ROOMY = EngineConfig(max_batch_size=16, num_tokens_per_iter=256, cache_max_entry_count=600, cache_block_seq_len=64)


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    with serving(folder, write_tiny_artifact(folder), CONFIG) as found:
        yield found


@pytest.fixture(scope="session")
def roomy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """2048 tokens a session, where `served` has 128."""
    folder = tmp_path_factory.mktemp("roomy")
    with serving(folder, write_tiny_artifact(folder, session_len=2048), ROOMY) as found:
        yield found


@pytest.fixture(scope="session")
def demo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace of the demo's own model."""
    folder = tmp_path_factory.mktemp("demo") / "workspace"
    convert(Conversion(name="demo", source=DEMO, target=folder))
    return folder


@pytest.fixture
def api(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key=KEY, max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture
def wide(roomy: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{roomy.url}/v1", api_key=KEY, max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    write_tiny_artifact(path, chat_template=None)
    return path
