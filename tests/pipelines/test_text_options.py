import math

import pytest

from pipelines.text_options import Calibration, Part, Text, calibration_problems, text_parts, text_problems

DIGEST = "0" * 64


def test_what_holds():
    for calibration in (
        Calibration(path="c.txt"),
        Calibration(kind="chat", path="c.jsonl", sampling="stratified"),
        Calibration(kind="chat", digest=DIGEST),
        Calibration(kind="c4", path="copy", sampling="reference"),
        Calibration(parts={"a": Part(path="a.txt", weight=2), "b": Part(kind="chat", path="b.jsonl")}),
    ):
        assert list(calibration_problems(calibration)) == []


@pytest.mark.parametrize(
    ("calibration", "expected"),
    [
        (Calibration(kind="chat"), "calibration has no source: give calibration.path=FILE (.jsonl, or a folder"),
        (Calibration(), "calibration has no source: give calibration.path=FILE (.txt, .jsonl, or a folder"),
        (Calibration(path="a", sampling="reference"), "sampling=reference is a procedure for wikitext2, ptb, c4, pile"),
        (Calibration(path="a", parts={"b": Part(path="b")}), "calibration has a text of its own and parts"),
        (Calibration(kind="ptb", parts={"b": Part(path="b")}), "calibration has a text of its own and parts"),
        (Calibration(sampling="reference", parts={"b": Part(path="b")}), "sampling=reference knows no mixtures"),
        (Calibration(parts={"My-Chats": Part(path="b")}), "calibration.parts.My-Chats: a name has only a-z, 0-9 and _"),
        (Calibration(parts={"b": Part(path="b", weight=0)}), "calibration.parts.b.weight=0 must be above 0"),
        (Calibration(parts={"b": Part(path="b", weight=math.inf)}), "calibration.parts.b.weight=inf must be above 0"),
        (Calibration(parts={"b": Part(path="b", weight=math.nan)}), "calibration.parts.b.weight=nan must be above 0"),
        (Calibration(parts={"b": Part(kind="chats", path="b")}), "calibration.parts.b.kind=chats must be one of"),
        (Calibration(parts={"b": Part()}), "calibration.parts.b has no source: give calibration.parts.b.path=FILE"),
        (Calibration(parts={"b": Part(path="b", digest="1")}), "calibration.parts.b.digest"),
    ],
)
def test_what_is_refused_says_the_key_and_the_way_out(calibration, expected):
    [problem] = calibration_problems(calibration)
    assert expected in problem


def test_texts_by_their_keys():
    alone = Calibration(path="a")
    assert text_parts(alone) == {"calibration": alone}
    parts = {"a": Part(path="a"), "b": Part(path="b")}
    assert text_parts(Calibration(parts=parts)) == {f"calibration.parts.{name}": part for name, part in parts.items()}


def test_conversations_are_no_plain_text():
    assert "evaluation.text.kind=chat must be one of" in next(text_problems("evaluation.text", Text("chat", path="a")))
