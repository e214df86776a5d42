from pipelines.evaluation.answers import Answer, count_flips


def _answers(rights: str) -> list[Answer]:
    return [Answer(token_ids=(1,), text="x", right=letter == "r") for letter in rights]


def test_flips_are_counted_in_both_directions() -> None:
    flips = count_flips(_answers("rrrww"), _answers("rwwrw"))
    assert (flips.num_questions, flips.base_right, flips.candidate_right) == (5, 3, 2)
    assert (flips.right_to_wrong, flips.wrong_to_right) == (2, 1)
    assert flips.rate(confidence=0.95).value == 0.6


def test_flips_that_cancel_out_are_flips() -> None:
    flips = count_flips(_answers("rw"), _answers("wr"))
    assert flips.base_right == flips.candidate_right
    assert flips.rate(confidence=0.95).value == 1.0
