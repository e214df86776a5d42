"""Requests made by schemathesis from our own OpenAPI description, valid ones and broken ones: none ends in a 5xx."""

import httpx
import hypothesis
import pytest
import schemathesis
from hypothesis import HealthCheck, given, seed, settings
from schemathesis import GenerationMode

from tests.server.running import HEADERS, Served

MODES = (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)


def run(served: Served, *, examples: int, seeded: int) -> tuple[int, list[str]]:
    """(requests sent, those that ended in a 5xx), `examples` for each operation and mode."""
    description = httpx.get(f"{served.url}/openapi.json", headers=HEADERS).json()
    sent, failed, answered = 0, [], 0
    for found in schemathesis.openapi.from_dict(description).get_all_operations():
        operation = found.ok()
        for mode in MODES:

            @seed(seeded)
            @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
            @given(case=operation.as_strategy(mode))
            def ask(case: schemathesis.Case) -> None:
                nonlocal sent, answered
                if isinstance(case.body, dict) and sent % 4:
                    # An unknown model ends a request before anything else does, and long answers take long.
                    case.body |= {"model": "tiny"} if "model" in case.body else {}
                    case.body |= {key: 2 for key in ("max_tokens", "request_output_len") if key in case.body}
                response = case.call(
                    base_url=served.url, headers=HEADERS, timeout=300
                )  # a first grammar waits for its process to start
                sent += 1
                answered += response.status_code == 200
                if response.status_code >= 500:
                    failed.append(f"{response.status_code} {case.as_curl_command()[:2000]}")

            try:
                ask()
            except hypothesis.errors.Unsatisfiable as error:
                # A GET without parameters cannot be broken.
                assert mode.is_negative, error
    assert answered > sent / 20, "next to nothing got past the first check"
    return sent, failed


def test_no_request_ends_in_a_5xx(served: Served) -> None:
    sent, failed = run(served, examples=5, seeded=1)
    assert sent >= 60
    assert not failed, failed[:3]
    assert served.unfinished() == 0


@pytest.mark.soak
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("part", range(4))
def test_no_request_ends_in_a_5xx_soak(served: Served, soak_row: dict[str, int], part: int) -> None:
    """5000 requests, in four parts that can run beside each other."""
    while soak_row["count"] < 1250:
        sent, failed = run(served, examples=15, seeded=1000 * (part + 1) + soak_row["count"])
        soak_row["count"] += sent
        soak_row["failures"] += len(failed)
        assert not failed, failed[:3]
    assert served.unfinished() == 0
