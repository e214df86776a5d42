import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import workload


def test_fixed_lengths_and_ids_of_the_vocabulary() -> None:
    requests = workload.fixed(5, 7, 9, vocab_size=11, seed=1)
    assert [(len(request.prompt_ids), request.new_tokens) for request in requests] == [(7, 9)] * 5
    assert {token for request in requests for token in request.prompt_ids} <= set(range(workload.FIRST_ID, 11))
    assert requests == workload.fixed(5, 7, 9, vocab_size=11, seed=1)
    assert requests != workload.fixed(5, 7, 9, vocab_size=11, seed=2)


def test_log_normal_lengths_have_the_means_that_are_stated() -> None:
    requests = workload.log_normal(20000, vocab_size=100, seed=0)
    inputs = [len(request.prompt_ids) for request in requests]
    outputs = [request.new_tokens for request in requests]
    assert np.mean(inputs) == pytest.approx(240, rel=0.02)
    assert np.mean(outputs) == pytest.approx(229, rel=0.02)
    assert min(inputs + outputs) >= workload.SHORTEST
    assert max(inputs + outputs) <= workload.LONGEST


def test_a_smaller_count_is_another_draw_but_the_same_every_time() -> None:
    assert workload.log_normal(10, vocab_size=100, seed=0) == workload.log_normal(10, vocab_size=100, seed=0)


def test_share_gpt_takes_first_turns_that_fit(tmp_path: Path) -> None:
    def talk(*texts: str) -> dict[str, object]:
        return {"conversations": [{"from": "human", "value": text} for text in texts]}

    talks = [talk("x" * 2000, "y" * 10), talk("one"), talk("a" * 10, "b" * 20, "c"), talk("a" * 11, "b")]
    file = tmp_path / "talks.json"
    file.write_text(json.dumps(talks))
    encode = lambda text: list(text.encode())  # noqa: E731
    [found] = workload.share_gpt(file, encode, 1, seed=0)
    assert (len(found.prompt_ids), found.new_tokens) == (10, 20)
    with pytest.raises(ValueError, match="has 1 conversations that fit, but requests=2"):
        workload.share_gpt(file, encode, 2, seed=0)
    file.write_text('[{"text": 1}]')
    with pytest.raises(ValueError, match="not in ShareGPT's format"):
        workload.share_gpt(file, encode, 1, seed=0)


def test_arrivals_are_poisson() -> None:
    times = workload.arrivals(20000, 50.0, seed=3)
    gaps = np.diff(times)
    assert times[0] == 0
    assert np.mean(gaps) == pytest.approx(1 / 50, rel=0.03)
    assert np.std(gaps) == pytest.approx(1 / 50, rel=0.05)  # exponential: deviation = mean
    assert workload.arrivals(3, 0, seed=0) == [0.0, 0.0, 0.0]
