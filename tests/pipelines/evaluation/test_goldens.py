import dataclasses

from pipelines.evaluation.goldens import NUM_PROMPTS, choose_prompts
from pipelines.evaluation.texts import Item, Question
from tests.engine.runtime.tiny_model import CharTokenizer
from tests.pipelines.evaluation.test_kept import BASELINE


class Decoding(CharTokenizer):
    def decode(self, ids, *, skip_special: bool = True) -> str:
        return self.text(ids)


def test_prompts_are_spread_over_the_questions() -> None:
    questions = [Question(prompt=f"q{i}", prompt_ids=(i,), answer="a") for i in range(12)]
    found = choose_prompts(dataclasses.replace(BASELINE, questions=questions), Decoding())
    assert found == {"q0": [0], "q3": [3], "q6": [6], "q9": [9]}
    few = choose_prompts(dataclasses.replace(BASELINE, questions=questions[:2]), Decoding())
    assert list(few) == ["q0", "q1"]


def test_without_questions_prompts_are_the_beginnings_of_items() -> None:
    items = [Item(token_ids=(i, *range(10)), first_scored=1) for i in range(NUM_PROMPTS)]
    found = choose_prompts(dataclasses.replace(BASELINE, questions=[], items=items), Decoding())
    assert list(found.values()) == [[i, 0, 1, 2, 3, 4] for i in range(NUM_PROMPTS)]
    assert found["aabcde"] == [0, 0, 1, 2, 3, 4]
