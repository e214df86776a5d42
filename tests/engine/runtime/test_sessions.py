import queue
import threading
from dataclasses import replace

import pytest

from engine.config import EngineConfig, Sampling
from engine.runtime.engine import Engine
from engine.runtime.sessions import SessionRequest, Sessions, SessionThread, turbomind_sampling
from tests.tiny_artifact import SESSION_LEN, write_tiny_artifact

GREEDY = Sampling(temperature=0.0, max_new_tokens=6, ignore_eos=True)
NOTHING = replace(GREEDY, max_new_tokens=0)
CONFIG = EngineConfig(cache_block_seq_len=4, cache_max_entry_count=200, max_batch_size=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("artifact") / "tiny"
    write_tiny_artifact(path)
    return path


@pytest.fixture(scope="module")
def engine(folder):
    return Engine.from_workspace(folder, CONFIG)


@pytest.fixture
def sessions(engine):
    yield Sessions(engine, most_sessions=3)
    while engine.has_work():
        engine.step()
    engine.check()


class Heard:
    """Keeps what is replied; stops listening after `patience` replies."""

    def __init__(self, patience=1000):
        self.updates, self.error, self.final, self._patience = [], None, False, patience

    def __call__(self, token_ids, *, final, error=None):
        assert not self.final
        self.updates.append(list(token_ids))
        self.error, self.final = error, final
        return len(self.updates) < self._patience


def ask(sessions, *, heard=None, wait=True, **fields):
    heard = heard or Heard()
    sessions.take(SessionRequest(**{"sampling": GREEDY, **fields}), heard)
    while wait and sessions.has_work():
        sessions.step()
    return heard


def answer_to(engine, prompt, sampling=GREEDY):
    [completion] = engine.generate([prompt], sampling)
    return list(completion.token_ids)


def test_a_round_streams_the_whole_session(sessions, engine):
    heard = ask(sessions, session_id=7, start=True, input_ids=[2, 3, 4])
    assert heard.final and heard.error is None and len(heard.updates) == 6
    assert [len(update) for update in heard.updates] == [4, 5, 6, 7, 8, 9]
    assert heard.updates[-1] == [2, 3, 4, *answer_to(engine, [2, 3, 4])]


def test_the_next_round_goes_on_and_its_beginning_is_cached(sessions, engine, monkeypatch):
    first = ask(sessions, session_id=7, start=True, input_ids=[2, 3, 4]).updates[-1]
    cached = []
    advance = engine.step

    def step():
        events = advance()
        cached.extend(event.cached_tokens for event in events)
        return events

    monkeypatch.setattr(engine, "step", step)
    second = ask(sessions, session_id=7, input_ids=[5, 6]).updates[-1]
    assert second[:-6] == [*first, 5, 6]
    assert max(cached) >= 8
    assert second[-6:] == answer_to(engine, [*first, 5, 6])


def test_step_rewinds(sessions, engine):
    first = ask(sessions, session_id=7, start=True, input_ids=[2, 3, 4]).updates[-1]
    second = ask(sessions, session_id=7, input_ids=[9], step=5).updates[-1]
    assert second == [*first[:5], 9, *answer_to(engine, [*first[:5], 9])]
    assert "has 12 tokens" in ask(sessions, session_id=7, input_ids=[9], step=13).error
    assert "step is -2" in ask(sessions, session_id=7, input_ids=[9], step=-2).error
    assert ask(sessions, session_id=7, sampling=NOTHING).updates == [second]


def test_end_forgets_and_start_begins_anew(sessions):
    ask(sessions, session_id=7, start=True, input_ids=[2])
    again = ask(sessions, session_id=7, start=True, end=True, input_ids=[3, 4])
    assert again.updates[-1][:2] == [3, 4] and len(sessions) == 0
    assert "no session 7" in ask(sessions, session_id=7, input_ids=[5]).error
    ask(sessions, session_id=7, start=True, input_ids=[2], sampling=NOTHING)
    assert len(sessions) == 1
    assert ask(sessions, session_id=7, end=True, sampling=NOTHING).updates == [[2]]
    assert len(sessions) == 0


def test_a_request_without_an_id_is_a_session_of_its_own(sessions, engine):
    heard = [ask(sessions, input_ids=[2, 3], wait=False), ask(sessions, input_ids=[4, 5], wait=False)]
    while sessions.has_work():
        sessions.step()
    assert [each.updates[-1][2:] for each in heard] == [answer_to(engine, [2, 3]), answer_to(engine, [4, 5])]
    assert len(sessions) == 0
    assert "nothing to stop" in ask(sessions, stop=True).error


def test_stop_ends_the_round_and_keeps_the_session(sessions):
    running = ask(
        sessions, session_id=7, start=True, input_ids=[2], sampling=replace(GREEDY, max_new_tokens=90), wait=0
    )
    sessions.step()
    sessions.step()
    assert "is answering" in ask(sessions, session_id=7, input_ids=[3], wait=False).error
    assert "is answering" in ask(sessions, session_id=7, start=True, input_ids=[3], wait=False).error
    stopping = ask(sessions, session_id=7, stop=True)
    assert stopping.final and running.final and running.error is None
    assert len(running.updates[-1]) == 3 and stopping.updates[-1] == running.updates[-1]
    assert "not answering" in ask(sessions, session_id=7, stop=True).error
    assert ask(sessions, session_id=7, input_ids=[3]).updates[-1][:4] == [*running.updates[-1], 3]
    assert "exclude each other" in ask(sessions, session_id=7, start=True, stop=True).error


def test_stop_with_end_forgets_the_session(sessions):
    ask(sessions, session_id=7, start=True, input_ids=[2], wait=False)
    ask(sessions, session_id=8, start=True, input_ids=[2])
    for session_id in (7, 8):
        ask(sessions, session_id=session_id, stop=True, end=True)
    assert len(sessions) == 0


def test_nobody_listening_ends_the_round(sessions):
    heard = ask(sessions, heard=Heard(patience=2), session_id=7, start=True, input_ids=[2])
    assert heard.final and len(heard.updates) == 3


def test_what_does_not_fit_is_refused_and_changes_nothing(sessions):
    before = ask(sessions, session_id=7, start=True, input_ids=[2, 3]).updates[-1]
    for fields, message in (
        ({"input_ids": [1] * SESSION_LEN}, f"session_len is {SESSION_LEN}"),
        ({"input_ids": [4], "session_len": 9}, "session_len is 9"),
        ({"input_ids": [4], "session_len": SESSION_LEN + 1}, f"room for {SESSION_LEN}"),
        ({"input_ids": [100_000]}, "token id 100000"),
        ({"input_ids": [4], "sampling": replace(GREEDY, top_p=2.0)}, "top_p"),
    ):
        heard = ask(sessions, session_id=7, **fields)
        assert message in heard.error and heard.final
    assert "session_len" in ask(sessions, session_id=9, start=True, input_ids=[1] * SESSION_LEN).error
    assert len(sessions) == 1
    assert ask(sessions, session_id=7, sampling=NOTHING).updates == [before]
    assert len(ask(sessions, session_id=7, input_ids=[4], session_len=11).updates[-1]) == 11


def test_the_session_unused_for_longest_is_forgotten(sessions):
    for session_id in (1, 2, 3):
        ask(sessions, session_id=session_id, start=True, input_ids=[2])
    ask(sessions, session_id=1, input_ids=[3])
    ask(sessions, session_id=4, start=True, input_ids=[2])
    assert len(sessions) == 3
    assert "3 are kept" in ask(sessions, session_id=2, input_ids=[3]).error
    assert ask(sessions, session_id=1, input_ids=[3]).error is None


def test_a_thread_answers_many_at_once_and_says_when_it_ends(folder):
    thread = SessionThread(Engine.from_workspace(folder, CONFIG))
    finals = queue.Queue()

    def submit(session_id, **fields):
        def reply(token_ids, *, final, error=None):
            if final:
                finals.put((session_id, error))
            return True

        thread.submit(SessionRequest(session_id=session_id, start=True, input_ids=[2, 3], **fields), reply)

    callers = [threading.Thread(target=submit, args=(number,), kwargs={"sampling": GREEDY}) for number in range(6)]
    for caller in callers:
        caller.start()
    assert {finals.get(timeout=30) for _ in callers} == {(number, None) for number in range(6)}
    submit(9, sampling=replace(GREEDY, max_new_tokens=SESSION_LEN))
    thread.close()
    session_id, error = finals.get(timeout=30)
    assert session_id == 9 and error in (None, "The engine was closed.")


def test_an_engine_that_fails_is_told_to_everybody(folder, monkeypatch, capfd):
    engine = Engine.from_workspace(folder, CONFIG)
    monkeypatch.setattr(engine, "step", lambda: 1 / 0)
    thread = SessionThread(engine)
    errors = queue.Queue()
    for _ in range(2):
        thread.submit(
            SessionRequest(input_ids=[2], sampling=GREEDY), lambda ids, *, final, error=None: errors.put(error)
        )
        assert "ZeroDivisionError" in errors.get(timeout=30)
    thread.close()
    assert "ZeroDivisionError" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("top_k", "top_p", "expected"),
    [(0, 0.0, (0.0, 0, 1.0)), (40, 0.0, (0.7, 40, 1.0)), (0, 0.5, (0.7, 0, 0.5)), (1, 0.5, (0.7, 1, 0.5))],
)
def test_turbomind_s_rule_for_top_k_and_top_p(top_k, top_p, expected):
    sampling = turbomind_sampling(
        request_output_len=5,
        runtime_top_k=top_k,
        runtime_top_p=top_p,
        temperature=0.7,
        repetition_penalty=1.1,
        random_seed=3,
    )
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == expected
    assert (sampling.max_new_tokens, sampling.repetition_penalty, sampling.seed) == (5, 1.1, 3)
