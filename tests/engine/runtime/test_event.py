import subprocess
import sys

import pytest

from engine.runtime.event import Event


def test_an_event_is_a_value():
    event = Event(
        request_id="a",
        token_ids=(3, 4),
        text="x",
        finish_reason=None,
        prompt_tokens=5,
        cached_tokens=2,
        completion_tokens=2,
    )
    assert event == event._replace() != event._replace(text="y")
    with pytest.raises(AttributeError):
        event.text = "y"


def test_who_only_reads_events_needs_no_torch():
    code = "import sys; import engine.runtime.event, engine.runtime.client; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
