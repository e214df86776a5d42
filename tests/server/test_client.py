import threading
import time

import pytest

from server.client import Client, Params, ServerError
from tests.server.running import KEY, Served

QUESTION = [{"role": "user", "content": "the cat"}]
# A penalty under 1 makes the model repeat itself: the answer has no end of its own.
ENDLESS = Params(temperature=0, repetition_penalty=0.5, max_tokens=None)


def test_every_method(served: Served) -> None:
    with Client(served.url, api_key=KEY) as client:
        model = client.model()
        assert (model.id, model.artifact_id, model.verdict) == ("tiny", served.artifact_id, "pass")
        answer = client.chat(QUESTION, Params(temperature=0, max_tokens=6))
        pieces = list(answer)
        assert len(pieces) > 1
        assert answer.finish_reason == "length"
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 6
        assert answer.first_seconds is not None
        assert answer.tokens_per_second is not None
        assert answer.fingerprint is not None
        assert "".join(client.chat(QUESTION, Params(temperature=0, max_tokens=6))) == "".join(pieces)
        assert "".join(client.complete("the cat", Params(max_tokens=3)))
        ids = client.tokenize("the cat sat")
        assert ids == served.tokenizer.encode("the cat sat")
        assert "the cat sat" in client.detokenize(ids)


def test_a_session(served: Served) -> None:
    with Client(served.url, api_key=KEY) as client:
        first, second, third = (client.interactive(77, "the dog", request_output_len=2) for _ in range(3))
        list(first)
        list(second)
        client.end_session(77)
        list(third)
        assert first.usage is not None
        assert second.usage is not None
        assert third.usage is not None
        assert first.usage.prompt_tokens == third.usage.prompt_tokens < second.usage.prompt_tokens


@pytest.mark.parametrize("way", ["close", "stop"])
def test_an_answer_is_ended_early_and_the_server_with_it(served: Served, way: str) -> None:
    with Client(served.url, api_key=KEY) as client:
        answer = client.chat(QUESTION, ENDLESS)
        assert next(answer)
        if way == "close":
            answer.close()
        else:
            threading.Timer(0.01, answer.stop).start()
            list(answer)
            assert answer.stopped
    end = time.monotonic() + 10
    while served.unfinished():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_errors_are_the_servers_words(served: Served) -> None:
    with Client(served.url, api_key="wrong") as client, pytest.raises(ServerError, match="key") as refused:
        client.models()
    assert refused.value.status == 401
    with Client(served.url, api_key=KEY) as client, pytest.raises(ServerError, match="temperature") as refused:
        list(client.chat(QUESTION, Params(temperature=9)))
    assert refused.value.status == 400
    with Client("http://127.0.0.1:1") as client, pytest.raises(ServerError, match="no server answers") as nobody:
        client.model()
    assert nobody.value.status is None
    with pytest.raises(ServerError, match="printable ASCII"):
        Client(served.url, api_key="é")
