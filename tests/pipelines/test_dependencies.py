"""Every stage of dvc.yaml depends on the code that its module can reach: all of it, and no other."""

import shutil
from pathlib import Path

import grimp
import pytest
import yaml

from pipelines import compose
from pipelines.code import READ, Code
from pipelines.schema import WEIGHTS

ROOT = Path(__file__).resolve().parents[2]
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
PACKAGES = ("engine", "pipelines", "server", "cli", "benchmarks", "demo")


@pytest.fixture(scope="module")
def graph():
    return grimp.build_graph(*PACKAGES, cache_dir=None)


def source_file(module):
    path = ROOT / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def closure(graph, stage, recipe):
    """The files of code that grimp finds, which builds the graph of imports on its own; empty packages are left out."""
    roots = {f"pipelines.{stage}"}
    if recipe:
        package = f"pipelines.quant.{recipe}"
        roots |= {package} | graph.find_descendants(package)
    reached = roots.union(*(graph.find_upstream_modules(root) for root in roots))
    packages = {name.rpartition(".")[0] for name in reached} | {name.partition(".")[0] for name in reached}
    files = {source_file(name) for name in (reached | packages) - {""}}
    return {path.relative_to(ROOT).as_posix() for path in files if path.read_text().strip()}


@pytest.mark.parametrize(
    ("stage", "recipe"), [*((stage, None) for stage in compose.STAGES), *(("quantize", name) for name in WEIGHTS)]
)
def test_the_code_of_a_stage_is_what_it_imports(graph, stage, recipe):
    found = set(Code(ROOT).digests(stage, recipe))
    read = {path for path in found if path.startswith(tuple(f"{folder}/" for folder in READ.values()))}
    assert found - read == closure(graph, stage, recipe)
    for module, folder in READ.items():
        files = {p.relative_to(ROOT).as_posix() for p in (ROOT / folder).rglob("*") if p.is_file()}
        files = {path for path in files if "__pycache__" not in path}
        assert files and read & files == (files if module in found else set())


def test_an_edit_changes_the_stages_that_reach_it(tmp_path):
    for package in ("engine", "pipelines"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    before = {name: Code(tmp_path).digests("quantize", name) for name in ("fp16", "w4a16")}
    with (tmp_path / "pipelines/quant/w4a16/awq.py").open("a") as file:
        file.write("# more\n")
    after = {name: Code(tmp_path).digests("quantize", name) for name in ("fp16", "w4a16")}
    assert after["fp16"] == before["fp16"]
    changed = {path for path in after["w4a16"] if after["w4a16"][path] != before["w4a16"].get(path)}
    assert changed == {"pipelines/quant/w4a16/awq.py"}


@pytest.mark.parametrize("stage", [name for name in STAGES if name != "compose"])
def test_a_stage_depends_on_its_own_code(stage):
    name = "quantize-${item.weights}" if stage == "quantize" else stage
    assert STAGES[stage]["deps"][1] == f"build/slices/code/{name}.json"


@pytest.mark.parametrize("stage", [name for name in STAGES if name != "compose"])
def test_a_stage_depends_on_its_own_slice(stage):
    assert STAGES[stage]["deps"][0] == f"build/slices/{stage}/${{key}}.json"


@pytest.mark.parametrize("stage", [name for name in STAGES if name != "compose"])
def test_every_input_on_the_command_line_is_a_dependency(stage):
    inputs = [word.partition("=")[2] for word in STAGES[stage]["cmd"].split() if "=build/" in word]
    assert inputs == [dep for dep in STAGES[stage]["deps"] if dep.startswith("build/") and "slices" not in dep]


def test_compose_runs_every_time():
    assert STAGES["compose"]["always_changed"] is True
    assert STAGES["compose"]["outs"] == ["build/slices"]


def test_publish_is_never_taken_from_the_run_cache():
    """It writes the verdict into the store: a reverted gate has to write the old verdict again."""
    assert STAGES["publish"]["outs"] == [{"build/publish/${key}.json": {"cache": False}}]


def reached_from(graph, module):
    return {name.partition(".")[0] for name in graph.find_upstream_modules(module)}


@pytest.mark.parametrize("stage", [name for name in STAGES if name != "compose"])
def test_stages_run_bare(stage):
    """No Hydra, OmegaConf or DVC: a stage runs where they are not installed."""
    graph = grimp.build_graph(*PACKAGES, include_external_packages=True, cache_dir=None)
    assert not {"hydra", "omegaconf", "dvc"} & reached_from(graph, f"pipelines.{stage}")


@pytest.mark.parametrize("module", ["compose", "publish", "gate"])
def test_bookkeeping_does_not_import_torch(module):
    graph = grimp.build_graph(*PACKAGES, include_external_packages=True, cache_dir=None)
    assert "torch" not in reached_from(graph, f"pipelines.{module}")
