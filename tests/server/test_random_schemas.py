"""json_schema answers validate: random schemas, the demo's own model, temperature 1.5."""

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jsonschema
import openai
import pytest

from engine.config import EngineConfig
from tests.server.random_schemas import random_schema
from tests.server.running import KEY, Served, serving

CONFIG = EngineConfig(max_batch_size=32, num_tokens_per_iter=512, cache_max_entry_count=600, cache_block_seq_len=32)


@pytest.fixture(scope="module")
def demo(demo_folder: Path) -> Iterator[Served]:
    with serving(demo_folder, None, CONFIG) as found:
        yield found


def ask(client: openai.OpenAI, number: int) -> str:
    """`valid`, `cut` for an answer that came to the session's end, or what is wrong."""
    schema = random_schema(number)
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    question = [{"role": "user", "content": "What animal lives with Odette Vickers?"}]
    choice = client.chat.completions.create(
        model="tiny", messages=question, response_format=wanted, temperature=1.5, seed=number
    ).choices[0]
    if choice.finish_reason == "length":
        return "cut"
    try:
        draft = jsonschema.Draft202012Validator
        validator = draft(schema, format_checker=draft.FORMAT_CHECKER)
        validator.validate(json.loads(choice.message.content))
    except (ValueError, jsonschema.ValidationError) as error:
        return f"schema {number} {json.dumps(schema)}: {choice.message.content!r}: {str(error)[:300]}"
    return "valid"


def ask_all(served: Served, numbers: Sequence[int]) -> list[str]:
    with (
        openai.OpenAI(base_url=f"{served.url}/v1", api_key=KEY, max_retries=0, timeout=600) as client,
        ThreadPoolExecutor(32) as pool,
    ):
        return list(pool.map(lambda number: ask(client, number), numbers))


def test_every_answer_validates(demo: Served) -> None:
    found = ask_all(demo, range(15))
    assert set(found) <= {"valid", "cut"}, found
    assert found.count("valid") >= 12, "an answer that is cut says little"


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_every_answer_validates_soak(demo: Served, soak_row: dict[str, int]) -> None:
    found = ask_all(demo, range(100, 600))
    soak_row["count"] = len(found)
    wrong = [each for each in found if each not in ("valid", "cut")]
    soak_row["failures"] = len(wrong)
    assert not wrong, wrong[:5]
    assert found.count("valid") >= 475
