import os
import signal
import time

import pytest

from engine.runtime.confined_process import ConfinedProcess

FIRST = {"template": "{{ messages[0].content }}", "special_tokens": {}}
QUESTION = {"messages": [{"role": "user", "content": "a"}], "tools": None, "add_generation_prompt": False}


def process(first=FIRST):
    return ConfinedProcess("engine.runtime.template_sandbox", first, refused="not this", ended="too much")


def test_it_starts_with_the_first_question_and_again_after_its_end():
    made = process()
    assert made.process_id is None
    assert made.ask(QUESTION) == {"text": "a"}
    before = made.process_id
    os.kill(before, signal.SIGKILL)
    while made.process_id is not None:
        time.sleep(0.01)
    assert made.ask(QUESTION) == {"text": "a"}
    assert made.process_id != before
    made.close()
    assert made.process_id is None


def test_a_first_line_that_is_refused_is_said():
    with pytest.raises(ValueError, match=r"^not this: "):
        process({**FIRST, "template": "{% for %}"}).start()
