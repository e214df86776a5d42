"""From declaration to slices. One file over 300 lines: one project fixture, a case for each thing that can change."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipelines import compose, slices
from pipelines.compose import write_slices
from pipelines.selection import read_rows, read_selection
from pipelines.toolchain import toolchain

ROOT = Path(__file__).resolve().parents[2]
SELECTION = {
    "models": ["one"],
    "calibrations": ["demo_text"],
    "weights": ["fp16", "w4a16"],
    "kvs": ["kv8"],
    "tps": [1],
    "evaluation": "demo",
    "overrides": [],
}


@pytest.fixture
def project(tmp_path):
    """conf/ of this project, two models and short texts."""
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(f'{{"name": "{name}"}}')
        (tmp_path / name / "model.safetensors").write_text(name)
        (tmp_path / f"conf/model/{name}.yaml").write_text(f"name: {name}\npath: {name}\n")
    (tmp_path / "demo/text").mkdir(parents=True)
    for name in ("calibration.txt", "evaluation.txt", "questions.jsonl"):
        (tmp_path / "demo/text" / name).write_text(f"{name}\n")
    select(tmp_path)
    return tmp_path


def select(project, **changes):
    (project / "params.yaml").write_text(yaml.safe_dump({**SELECTION, **changes}))


def changed(project, edit, **changes):
    """The names of the slices that an edit changes, adds or removes, as written on disk."""
    before = read_all(project)
    edit()
    if changes:
        select(project, **changes)
    after = read_all(project)
    return {name for name in {*before, *after} if before.get(name) != after.get(name)}


def read_all(project):
    write_slices(project)
    folder = project / "build/slices"
    return {path.relative_to(folder).as_posix()[:-5]: path.read_bytes() for path in folder.rglob("*.json")}


def replace(path, old, new):
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def test_one_slice_for_every_stage_instance(project):
    select(project, models=["one", "two"], kvs=["kv16", "kv8"], tps=[1, 2])
    found = read_all(project)
    counts = {}
    for name in found:
        counts[name.split("/")[0]] = counts.get(name.split("/")[0], 0) + 1
    assert counts == {
        "calibrate": 2, "quantize": 4, "shard": 8, "export": 16, "baseline": 2, "evaluate": 16, "publish": 16,
        "code": 8,
    }  # fmt: skip
    assert "export/one-demo_text-w4a16-2-kv8" in found


def test_a_slice_holds_what_its_stage_needs_and_no_path(project):
    select(project, kvs=["kv16", "kv8"])
    found = {name: json.loads(content) for name, content in read_all(project).items()}
    tools = toolchain()
    model = found["calibrate/one-demo_text"]["model"]
    assert model.keys() == {"kind", "digest"}
    assert found["quantize/one-demo_text-fp16"] == {"model": model, "weights": {"name": "fp16"}}
    assert found["quantize/one-demo_text-w4a16"] == {
        "model": model,
        "weights": {
            "name": "w4a16",
            "group_size": 128,
            "search": "grid",
            "method": "awq+gptq",
            "symmetric": False,
            "clip": True,
            "correction": 0.5,
            "activation_exponents": [0.0, 0.2, 0.4, 0.6],
            "weight_exponents": [0.0, 0.5, 1.0],
        },
        "toolchain": tools,
    }
    select(project, weights=["w8a8"])
    assert json.loads(read_all(project)["quantize/one-demo_text-w8a8"]) == {
        "model": model,
        "weights": {"name": "w8a8", "search": "grid", "alphas": [0.3, 0.4, 0.5, 0.6, 0.7, 0.8], "rotate_down": 8},
        "toolchain": tools,
    }
    int8 = read_all(project)
    assert json.loads(int8["shard/one-demo_text-w8a8-1"])["weights"]["rotate_down"] == 8
    assert {json.loads(text)["recipe"]["rotate_down"] for key, text in int8.items() if key.startswith("export/")} == {8}
    select(project, weights=["w8a8"], overrides=["weights.rotate_down=0"])
    assert not any("rotate_down" in str(content) for content in read_all(project).values())
    select(project, weights=["w8a8"], overrides=["weights.search=none"])
    formula = json.loads(read_all(project)["quantize/one-demo_text-w8a8"])
    assert formula["weights"] == {"name": "w8a8", "search": "none", "alpha": 0.5}
    assert found["shard/one-demo_text-w4a16-1"] == {
        "model": model,
        "weights": {"name": "w4a16", "group_size": 128},
        "tp": 1,
    }
    export = found["export/one-demo_text-fp16-1-kv16"]
    assert export == {
        "model": model,
        "name": "one",
        "session_len": 0,
        "recipe": {"weights": "fp16", "kv": "kv16", "group_size": 0},
        "tp": 1,
        "kv": {"name": "kv16"},
        "calibration": None,
    }
    assert len(found["export/one-demo_text-fp16-1-kv8"]["calibration"]) == 64
    export = found["export/one-demo_text-fp16-1-kv8"]
    assert export["kv"] == {"name": "kv8", "granularity": "channel", "symmetric": False}
    assert export["recipe"] == {"weights": "fp16", "kv": "kv8", "group_size": 0, "kv_granularity": "channel"}
    assert found["evaluate/one-demo_text-w4a16-1-kv8"].keys() == {"evaluation", "toolchain"}
    assert str(project) not in json.dumps(found)


def test_scales_of_every_token_need_no_calibration(project):
    select(project, kvs=["kv8"], overrides=["kv.granularity=token"])
    found = write_slices(project)
    export = found["export/one-demo_text-fp16-1-kv8"]
    assert export["kv"] == {"name": "kv8", "granularity": "token"} and export["calibration"] is None
    assert len(found["export/one-demo_text-w4a16-1-kv8"]["calibration"]) == 64


def test_paths_are_beside_the_slices(project):
    model = json.loads(read_all(project)["calibrate/one-demo_text"])["model"]
    paths = json.loads((project / "build/paths.json").read_text())
    assert paths[f"sha256:{model['digest']}"] == str(project / "one")
    assert paths["store"] == str(project / "store")
    assert slices.locate(model, paths=project / "build/paths.json", memory=project / "m.json") == project / "one"


def test_an_option_changes_the_slices_of_its_recipe_only(project):
    names = changed(project, lambda: replace(project / "conf/weights/w4a16.yaml", "128", "64"))
    assert names and all("w4a16" in name for name in names)
    assert {name.split("/")[0] for name in names} == {"quantize", "shard", "export"}


def test_a_quantized_head_is_said_to_those_who_make_it_and_w4a16_alone_has_it(project):
    assert "head" not in json.loads(read_all(project)["quantize/one-demo_text-w4a16"])["weights"]
    names = changed(project, lambda: None, overrides=["weights.head=int4"])
    assert names and all("w4a16" in name for name in names)
    assert {name.split("/")[0] for name in names} == {"quantize", "shard", "export"}
    found = {name: json.loads(content) for name, content in read_all(project).items()}
    assert found["quantize/one-demo_text-w4a16"]["weights"]["head"] == "int4"
    assert found["shard/one-demo_text-w4a16-1"]["weights"] == {"name": "w4a16", "group_size": 128, "head": "int4"}
    assert found["export/one-demo_text-w4a16-1-kv8"]["recipe"]["head"] == "int4"


def test_a_comment_and_an_unused_option_change_nothing(project):
    assert not changed(project, lambda: replace(project / "conf/weights/w4a16.yaml", "name:", "# why\nname:"))
    assert not changed(project, lambda: replace(project / "conf/weights/w4a16.yaml", "name:", "alpha: 0.7\nname:"))
    assert not changed(project, lambda: replace(project / "conf/weights/fp16.yaml", "name:", "group_size: 64\nname:"))


def test_a_field_used_by_interpolation_changes_that_model_only(project):
    select(project, models=["one", "two"], weights=["fp16"])
    replace(project / "conf/calibration/demo_text.yaml", "samples: 40", "seed: ${model.session_len}")
    names = changed(project, lambda: replace(project / "conf/model/one.yaml", "name:", "session_len: 99\nname:"))
    assert "calibrate/one-demo_text" in names
    assert all("/one-" in name for name in names)


def test_a_template_changes_what_is_said_and_not_what_is_computed(project):
    path = project / "conf/model/one.yaml"
    names = changed(project, lambda: replace(path, "name:", "template: chatml\nname:"))
    assert {name.split("/")[0] for name in names} == {"export", "baseline"}
    slices_of_one = project / "build/slices/export/one-demo_text-fp16-1-kv8.json"
    assert json.loads(slices_of_one.read_text())["template"] == "chatml"


def test_a_key_of_config_ini_changes_what_is_exported_and_nothing_else(project):
    names = changed(project, lambda: None, overrides=["ini.max_batch_size=8", "ini.cache_max_entry_count=100"])
    assert {name.split("/")[0] for name in names} == {"export"}
    exported = json.loads((project / "build/slices/export/one-demo_text-fp16-1-kv8.json").read_text())
    assert exported["ini"] == {"max_batch_size": 8, "cache_max_entry_count": 100.0}


def test_pickled_weights_are_part_of_the_source_where_they_may_be_read(project):
    (project / "one/pytorch_model.bin").write_text("one")
    assert not changed(project, lambda: (project / "one/pytorch_model.bin").write_text("another"))
    replace(project / "conf/model/one.yaml", "name:", "allow_bin: true\nname:")
    record = json.loads(read_all(project)["calibrate/one-demo_text"])["model"]
    assert record["allow_bin"] is True
    names = changed(project, lambda: (project / "one/pytorch_model.bin").write_text("a third"))
    assert "quantize/one-demo_text-fp16" in names


def test_one_byte_of_a_checkpoint_changes_that_model_only(project):
    select(project, models=["one", "two"], weights=["fp16"])
    names = changed(project, lambda: (project / "one/model.safetensors").write_text("onf"))
    assert {name.split("/")[0] for name in names} == {"calibrate", "quantize", "shard", "export", "baseline"}
    assert all("/one-" in name for name in names)


def test_a_gate_changes_the_evaluations_and_not_the_baseline(project):
    names = changed(project, lambda: replace(project / "conf/evaluation/demo.yaml", "1.05", "1.04"))
    assert {name.split("/")[0] for name in names} == {"evaluate"}


def test_calibration_text_does_not_reach_an_artifact_without_it(project):
    select(project, kvs=["kv16", "kv8"])
    names = changed(project, lambda: (project / "demo/text/calibration.txt").write_text("another\n"))
    assert "export/one-demo_text-fp16-1-kv8" in names
    assert "export/one-demo_text-fp16-1-kv16" not in names


def test_another_toolchain_changes_all_that_computes(project, monkeypatch):
    monkeypatch.setattr(compose, "toolchain", toolchain)
    other = {**toolchain(), "torch": "9.9"}
    names = changed(project, lambda: monkeypatch.setattr(compose, "toolchain", lambda: other))
    assert {name.split("/")[0] for name in names} == {"calibrate", "quantize", "baseline", "evaluate"}
    assert not any("quantize" in name and "fp16" in name for name in names)


def test_another_store_publishes_again(project):
    names = changed(project, lambda: shutil.rmtree(project / "store"))
    assert {name.split("/")[0] for name in names} == {"publish"}


def test_a_quantized_checkpoint_is_taken_as_it_is_or_not_at_all(project):
    config = {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 64}}
    (project / "two/config.json").write_text(json.dumps(config))
    select(project, models=["two"], weights=["as_is"], kvs=["kv16", "kv8"])
    found = {name: json.loads(content) for name, content in read_all(project).items()}
    assert found["quantize/two-demo_text-as_is"].keys() == {"model", "weights"}
    assert found["shard/two-demo_text-as_is-1"]["weights"] == {"name": "as_is", "group_size": 0}
    assert found["export/two-demo_text-as_is-1-kv16"]["calibration"] is None
    assert len(found["export/two-demo_text-as_is-1-kv8"]["calibration"]) == 64
    select(project, models=["two"], weights=["fp16"])
    with pytest.raises(ValueError, match=r"two is quantized already .*weights=fp16 starts from unquantized"):
        write_slices(project)
    select(project, models=["one"], weights=["as_is"])
    with pytest.raises(ValueError, match=r"one is not quantized"):
        write_slices(project)


def test_adding_and_removing_recipes(project):
    select(project, weights=["w4a16"])
    names = changed(project, lambda: None, weights=["fp16", "w4a16"])
    assert names and all("fp16" in name for name in names)


def test_one_schema_takes_an_override_for_recipes_that_do_not_use_it(project):
    names = changed(project, lambda: None, overrides=["weights.group_size=64"])
    assert names and all("w4a16" in name for name in names)


def test_a_shared_slice_on_which_rows_do_not_agree_is_refused(project):
    replace(project / "conf/calibration/demo_text.yaml", "samples: 40", "seed: ${weights.group_size}")
    replace(project / "conf/weights/fp16.yaml", "name:", "group_size: 64\nname:")
    with pytest.raises(ValueError, match=r"another calibrate/one-demo_text than a row that shares it.*\"seed\": 64"):
        write_slices(project)
    assert not (project / "build/slices").exists()


def test_a_source_that_is_absent_must_be_pinned(project):
    digest = json.loads(read_all(project)["calibrate/one-demo_text"])["model"]["digest"]
    before = {path: path.read_bytes() for path in (project / "build/slices").rglob("*.json")}
    shutil.rmtree(project / "one")
    with pytest.raises(FileNotFoundError, match=r"model names .*/one, which does not exist.*digest"):
        write_slices(project)
    replace(project / "conf/model/one.yaml", "name:", f"digest: {digest}\nname:")
    write_slices(project)
    assert {path: path.read_bytes() for path in (project / "build/slices").rglob("*.json")} == before
    paths = json.loads((project / "build/paths.json").read_text())
    assert f"sha256:{digest}" not in paths


def test_a_source_that_is_not_what_is_pinned_is_refused(project):
    replace(project / "conf/model/one.yaml", "name:", f"digest: {'ab' * 32}\nname:")
    with pytest.raises(ValueError, match=r"/one has the digest .*, but model is pinned to abab"):
        write_slices(project)


def test_a_hub_repository_is_its_commit_whether_it_is_here_or_not(project, monkeypatch):
    commit = "1" * 40
    (project / "conf/model/one.yaml").write_text(f"name: one\nrepo: org/one\nrevision: '{commit}'\n")
    monkeypatch.setattr("pipelines.hub.cached", lambda repo, revision, allow_bin: None)
    absent = read_all(project)
    monkeypatch.setattr("pipelines.hub.cached", lambda repo, revision, allow_bin: project / "two")
    assert read_all(project) == absent
    assert json.loads(absent["calibrate/one-demo_text"])["model"] == {
        "kind": "hub",
        "repo": "org/one",
        "revision": commit,
    }
    paths = json.loads((project / "build/paths.json").read_text())
    assert paths[f"hub:org/one@{commit}"] == str(project / "two")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"overrides": ["weights.bit=3"]}, "Key 'bit' not in 'Weights'"),
        ({"overrides": ["ini.head_num=3"]}, "ini.head_num cannot be set: it is an attribute of the model"),
        ({"overrides": ["+ini.quant_policy=4"]}, "ini.quant_policy cannot be set: kv says it"),
        ({"overrides": ["ini.max_batch_size=many"]}, "'many'.*could not be converted to Integer"),
        ({"overrides": ["ini.step_length=2"]}, "ini.step_length=2 must be 1"),
        ({"overrides": ["weights.group_size=four"]}, "'four'.*could not be converted to Integer"),
        ({"weights": ["w5"]}, "Could not find 'weights/w5'"),
        ({"models": ["local"]}, "path"),
        ({"weights": []}, "weights must be a list that is not empty"),
        ({"models": ["A-b"]}, "'A-b'; a name has only a-z, 0-9 and _"),
        ({"tps": [0]}, "tps holds 0"),
        ({"kvs": ["kv8", "kv8"]}, "names something twice"),
        ({"overrides": ["weights=w4a16"]}, "names an axis"),
        ({"overrides": ["tp=2"]}, "names an axis"),
        ({"evaluation": ["demo"]}, "evaluation must be a str"),
        ({"spare": 1}, "must hold exactly"),
    ],
)
def test_a_mistake_in_the_selection_is_named(project, changes, message):
    select(project, **changes)
    with pytest.raises(ValueError, match=message):
        write_slices(project)


def test_every_file_of_conf_composes(project):
    pinned = ["calibration.path=x", "evaluation.text.path=x", "model.path=x"]
    for group, axis in (("calibration", "calibrations"), ("weights", "weights"), ("kv", "kvs")):
        for path in (project / "conf" / group).glob("*.yaml"):
            select(project, **{"weights": ["fp16"], "overrides": pinned, axis: [path.stem]})
            assert read_rows(project, read_selection(project / "params.yaml"))
    for path in (project / "conf/evaluation").glob("*.yaml"):
        select(project, weights=["fp16"], overrides=pinned, evaluation=path.stem)
        assert read_rows(project, read_selection(project / "params.yaml"))


def test_the_projects_own_selection_composes():
    rows = read_rows(ROOT, read_selection(ROOT / "params.yaml"))
    assert [row.key for row in rows][:1] == ["demo-demo_text-fp16-1-kv16"]


def test_as_a_stage_a_mistake_is_one_paragraph(project):
    select(project, weights=["w5"])
    command = [sys.executable, "-m", "pipelines.compose"]
    environment = {"PYTHONPATH": str(ROOT), "PATH": ""}
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Could not find 'weights/w5'" in done.stderr
    assert "Traceback" not in done.stderr
