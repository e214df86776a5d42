"""Every stage of dvc.yaml depends on the files that its module imports: all of them, and no other."""

from pathlib import Path

import grimp
import pytest
import yaml

from pipelines.schema import WEIGHTS

ROOT = Path(__file__).resolve().parents[2]
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
PACKAGES = ("engine", "pipelines", "server", "cli", "benchmarks", "demo")
RECIPES = "pipelines/quant/${item.weights}"
# Folders of files that a module reads and does not import.
READ = {
    "engine/storage/triton_repository.py": "engine/storage/triton_models",
    "pipelines/template_files.py": "pipelines/templates",
}


@pytest.fixture(scope="module")
def graph():
    return grimp.build_graph(*PACKAGES, cache_dir=None)


def source_file(module):
    path = ROOT / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def closure(graph, stage):
    """The files that hold the code that a stage can reach, relative to the project; empty packages are left out."""
    roots = {f"pipelines.{stage}"}
    if RECIPES in declared(stage):  # imported by name
        packages = {f"pipelines.quant.{name}" for name in WEIGHTS}
        roots |= packages.union(*(graph.find_descendants(package) for package in packages))
    reached = roots.union(*(graph.find_upstream_modules(root) for root in roots))
    packages = {name.rpartition(".")[0] for name in reached} | {name.partition(".")[0] for name in reached}
    files = {source_file(name) for name in (reached | packages) - {""}}
    code = {path.relative_to(ROOT).as_posix() for path in files if path.read_text().strip()}
    return code | {folder for module, folder in READ.items() if module in code}


def declared(stage):
    """What dvc.yaml lists of code; a folder per recipe stands for the code of that recipe."""
    return {dep for dep in STAGES[stage]["deps"] if not dep.startswith("build/")}


@pytest.mark.parametrize("stage", [name for name in STAGES if name != "compose"])
def test_a_stage_depends_on_what_it_imports(graph, stage):
    expected = closure(graph, stage)
    if RECIPES in declared(stage):
        own = {path for path in expected if path.startswith(tuple(f"pipelines/quant/{name}/" for name in WEIGHTS))}
        expected = expected - own | {RECIPES}
    missing, superfluous = sorted(expected - declared(stage)), sorted(declared(stage) - expected)
    assert not missing and not superfluous, f"{stage} lacks {missing} and should not have {superfluous}"


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
