import asyncio

import pytest

from server.admission import Admission
from server.errors import RequestError


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_key_has_so_many_and_keeps_no_other_out() -> None:
    admission = Admission(most=3)
    first, _ = admission.enter("a", 2), admission.enter("a", 1)
    with pytest.raises(RequestError) as caught:
        admission.enter("a", 1)
    assert (caught.value.status, caught.value.headers) == (429, {"Retry-After": "1"})
    admission.enter("b", 3)
    assert admission.held == 6
    first.leave()
    admission.enter("a", 1)
    first.close()
    first.close()
    first.leave()
    assert admission.held == 5
    with pytest.raises(RequestError, match="up to 3") as caught:
        admission.enter("a", 4)
    assert caught.value.status == 400


def test_when_to_try_again_is_computed_from_how_fast_requests_end() -> None:
    clock = Clock()
    admission = Admission(most=10, clock=clock)
    visit = admission.enter("a", 10)
    for _ in range(4):
        visit.leave()
        clock.now += 2.0
    admission.enter("a", 4)
    # Four have ended in eight seconds: three more take six.
    assert admission.seconds_until("a", 3) == 6
    with pytest.raises(RequestError) as caught:
        admission.enter("a", 3)
    assert caught.value.headers == {"Retry-After": "6"}
    assert "6 seconds" in str(caught.value)
    assert admission.seconds_until("a", 1000) == 60
    assert admission.seconds_until("b", 1) == 1


def test_a_server_that_ends_waits_for_all() -> None:
    async def session() -> None:
        admission = Admission(most=3)
        visits = [admission.enter("a", 2), admission.enter("b", 1)]
        ended = asyncio.create_task(admission.drained())
        await asyncio.sleep(0)
        with pytest.raises(RequestError) as caught:
            admission.enter("a", 1)
        assert caught.value.status == 503
        visits[0].close()
        await asyncio.sleep(0.01)
        assert not ended.done()
        visits[1].leave()
        await asyncio.wait_for(ended, 5)
        await asyncio.wait_for(admission.drained(), 5)

    asyncio.run(session())
