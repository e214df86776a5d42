import itertools

import pytest
import yaml

from engine.storage.store import Store
from pipelines import ladder
from pipelines.ladder import RUNGS, climb
from pipelines.outcomes import read_outcome
from pipelines.slices import write_json
from tests.pipelines.built import MISS, project_folder, write_built

NAMES = [str(rung) for rung in RUNGS]
SELECTION = {
    "models": ["m"],
    "calibrations": ["c"],
    "weights": ["fp16", "w8a8", "w4a16"],
    "kvs": ["kv16", "kv8"],
    "tps": [1],
    "evaluation": "e",
    "overrides": [],
}


def measured(tmp_path, verdicts):
    """A function that measures a rung as `verdicts` says, and the list of what it was asked."""
    asked = []

    def measure(recipe):
        asked.append(str(recipe))
        verdict = verdicts[str(recipe)]
        write_built(tmp_path, str(recipe), verdict=verdict, gates=[] if verdict == "pass" else [MISS])
        return read_outcome(tmp_path, str(recipe))

    return measure, asked


@pytest.mark.parametrize(
    ("failing", "chosen", "tried"),
    [
        ([], "w4a16-kv8", NAMES),
        (["w4a16-kv8"], "w4a16", NAMES),
        (["w4a16"], "w8a8-kv8", NAMES[:5]),
        (["w8a8"], "w4a16-kv8", ["fp16", "fp16-kv8", "w8a8", "w4a16", "w4a16-kv8"]),
        (["w8a8-kv8"], "w4a16-kv8", NAMES),
        (["w8a8", "w4a16"], "fp16-kv8", ["fp16", "fp16-kv8", "w8a8", "w4a16"]),
        (["fp16-kv8"], "w4a16", ["fp16", "fp16-kv8", "w8a8", "w4a16"]),
        (["fp16-kv8", "w8a8", "w4a16"], "fp16", ["fp16", "fp16-kv8", "w8a8", "w4a16"]),
        (["fp16"], None, ["fp16"]),
    ],
)
def test_the_rule(tmp_path, failing, chosen, tried):
    measure, asked = measured(tmp_path, {name: "fail" if name in failing else "pass" for name in NAMES})
    recipe, steps = climb(measure)
    assert (None if recipe is None else str(recipe)) == chosen
    assert asked == tried
    assert [str(step.recipe) for step in steps] == NAMES


def test_whatever_the_verdicts_what_is_chosen_has_passed(tmp_path):
    for verdicts in itertools.product(("pass", "fail", "inconclusive"), repeat=len(NAMES)):
        measure, _ = measured(tmp_path, dict(zip(NAMES, verdicts, strict=True)))
        recipe, steps = climb(measure)
        assert (recipe is None) == (verdicts[0] != "pass")
        if recipe is not None:
            assert verdicts[NAMES.index(str(recipe))] == "pass"
        assert all(step.why for step in steps)


def test_every_step_says_why(tmp_path):
    measure, _ = measured(tmp_path, dict.fromkeys(NAMES, "pass") | {"fp16-kv8": "fail"})
    _, steps = climb(measure)
    assert [step.why for step in steps] == [
        "passes: go on",
        f"back to fp16: kl_mean 0.2500, {MISS['why']}",
        "passes: go on",
        "not tried: fp16-kv8 does not pass",
        "chosen: the last rung that passes",
        "not tried: fp16-kv8 does not pass",
    ]


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(project_folder(tmp_path))
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(SELECTION))
    write_json(tmp_path / "build/paths.json", {"store": str(tmp_path / "store"), "cache": str(tmp_path / "cache")})
    return tmp_path


def test_the_command_builds_prints_and_pins(project, monkeypatch, capsys):
    pinned, built = [], []

    def run_dvc(root, arguments):
        key = arguments[-1].removeprefix("publish@")
        built.append(key)
        failed = "w4a16" in key and "kv8" in key
        identity = f"{len(built)}" * 64
        write_built(root, key, verdict="fail" if failed else "pass", gates=[MISS] * failed, artifact=identity)
        return 0

    monkeypatch.setattr(ladder, "run_dvc", run_dvc)
    monkeypatch.setattr(Store, "pin", lambda self, name, identity: pinned.append((name, identity)))
    assert ladder.main(["m", "--pin", "demo"]) == 0
    assert built == [f"m-c-{weights}-1-{kv}" for weights in SELECTION["weights"] for kv in SELECTION["kvs"]]
    assert pinned == [("demo", "5" * 64)]
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"chosen: w4a16  {'5' * 64}  pinned as demo"
    row = next(line for line in lines if line.startswith("w4a16 "))
    assert row.split()[:5] == ["w4a16", "1.5", "MB", "512", "B"] and "555555555555" in row and "chosen" in row


@pytest.mark.parametrize(
    ("arguments", "changes", "message"),
    [
        (["x"], {}, "x is not among the models of params.yaml"),
        (["m", "--calibration", "x"], {}, "x is not among the calibrations"),
        (["m", "--tp", "4"], {}, "4 is not among the tps"),
        (["m"], {"kvs": ["kv16"]}, "kv8 is not among the kvs"),
    ],
)
def test_what_params_does_not_select_is_named(project, capsys, arguments, changes, message):
    (project / "params.yaml").write_text(yaml.safe_dump({**SELECTION, **changes}))
    assert ladder.main(arguments) == 1
    assert message in capsys.readouterr().err


def test_a_build_that_stops_and_a_model_that_fails_are_exit_code_1(project, monkeypatch, capsys):
    monkeypatch.setattr(ladder, "run_dvc", lambda root, arguments: 255)
    assert ladder.main(["m"]) == 1
    assert "m-c-fp16-1-kv16 could not be built" in capsys.readouterr().err
    write_built(project, "m-c-fp16-1-kv16", verdict="fail", gates=[MISS])
    monkeypatch.setattr(ladder, "run_dvc", lambda root, arguments: 0)
    assert ladder.main(["m"]) == 1
    assert "there is nothing to choose" in capsys.readouterr().err
