from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks.options import option, read_options


@dataclass(frozen=True, kw_only=True)
class Some:
    count: int = option(3, "how many", least=1)
    sizes: tuple[int, ...] = option((1, 2), "sizes", least=1)
    rate: float | None = option(None, "a second")
    kind: str = option("a", "which", choices=("a", "b"))
    on: bool = option(False, "whether")
    out: Path = option(Path("x"), "where")


def read(*argv: str) -> Some:
    return read_options(Some, argv, prog="ingot bench some", about="Something.")


def test_values_have_their_types() -> None:
    assert read() == Some()
    given = read("count=7", "sizes=4, 5", "rate=1.5", "kind=b", "on=true", "out=/a/b=c")
    assert given == Some(count=7, sizes=(4, 5), rate=1.5, kind="b", on=True, out=Path("/a/b=c"))


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("count", "'count' is not understood: options are given as key=value"),
        ("cuont=3", "there is no option 'cuont'. Did you mean count?"),
        ("count=three", "count is 'three', but must be a whole number"),
        ("count=0", "count is 0, but must be at least 1"),
        ("sizes=1,0", "sizes is 0, but must be at least 1"),
        ("sizes=1,,2", "sizes is empty"),
        ("rate=fast", "rate is 'fast', but must be a number"),
        ("rate=nan", "rate is 'nan', but must be a number"),
        ("kind=c", "kind is 'c', but must be one of a, b"),
        ("on=maybe", "on is 'maybe', but must be true or false"),
    ],
)
def test_a_mistake_names_what_is_allowed(argument: str, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        read(argument)
    with pytest.raises(ValueError, match="twice"):
        read("count=1", "count=2")


def test_help_says_every_option_and_ends(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        read("--help")
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert "usage: ingot bench some" in said
    assert "how many (3)" in said
    assert "sizes (1,2)" in said
    assert "which: a, b (a)" in said
