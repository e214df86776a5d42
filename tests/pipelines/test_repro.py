"""`dvc repro` alone is always right: what is edited, and which stages run then. On the demo, with the real stages.

Everything is cut down by overrides (few samples, short texts); what is tested is which stages run and what comes out.
"""

import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipelines.mend import mend
from pipelines.worktree import copy_tree
from tests.pipelines.warm_python import warm_python

ROOT = Path(__file__).resolve().parents[2]
PARAMS = """models: [demo]
calibrations: [demo_text]
weights: {weights}
kvs: [kv16]
tps: [1]
evaluation: demo
overrides: {overrides}
"""
SMALL = [
    "calibration.samples=4",
    "calibration.sequence_length=64",
    "weights.activation_exponents=[0.4]",
    "weights.weight_exponents=[0.0]",
    "evaluation.sequence_length=64",
    "evaluation.max_tokens=576",
    "evaluation.questions=null",
    "evaluation.gates.answer_flips_max=null",
]
C = "demo-demo_text"
FP16 = {f"quantize@{C}-fp16", f"shard@{C}-fp16-1", *(f"{x}@{C}-fp16-1-kv16" for x in ("export", "evaluate", "publish"))}
W4A16 = {name.replace("fp16", "w4a16") for name in FP16}
SHARED = {f"calibrate@{C}", "baseline@demo-demo"}
PUBLISH_FP16, PUBLISH_W4A16 = f"publish@{C}-fp16-1-kv16", f"publish@{C}-w4a16-1-kv16"


class Project:
    """A copy of the project with a cache and a store of its own."""

    def __init__(self, folder, programs=None):
        self.folder = folder
        copy_tree(ROOT, folder)
        if not (folder / "demo/model/config.json").is_file():
            pytest.skip("demo/model is not here: `python -m demo.train` makes it")
        (folder / ".dvc/config.local").write_text("[core]\n    no_scm = true\n")
        (folder / "dvc.lock").unlink(missing_ok=True)
        self.select("[w4a16]")
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.environment |= {"DVC_SITE_CACHE_DIR": f"{folder}.site", "DVC_NO_ANALYTICS": "1"}
        self.use(programs or Path(sys.executable).parent)

    def use(self, programs):
        """Take the `python` of this folder for dvc and for the stages."""
        self.python = str(programs / "python")
        self.environment["PATH"] = os.pathsep.join([str(programs), os.environ["PATH"]])

    def select(self, weights, *overrides):
        text = PARAMS.format(weights=weights, overrides=json.dumps([*SMALL, *overrides]))
        (self.folder / "params.yaml").write_text(text)

    def edit(self, name, old, new):
        text = (self.folder / name).read_text()
        assert old in text
        (self.folder / name).write_text(text.replace(old, new, 1))

    def start(self, *targets, **environment):
        return subprocess.Popen(
            [self.python, "-m", "dvc", "repro", *targets],
            cwd=self.folder,
            env={**self.environment, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def repro(self, *targets, **environment):
        """Run `dvc repro`; the names of the stages that ran, compose apart, which has to run every time."""
        process = self.start(*targets, **environment)
        text, _ = process.communicate(timeout=280)
        assert process.returncode == 0, text
        ran = set(re.findall(r"^Running stage '(.+)':$", text, re.MULTILINE))
        assert "compose" in ran, text
        return ran - {"compose"}

    def ids(self):
        published = sorted((self.folder / "build/publish").glob("*.json"))
        return {path.stem: json.loads(path.read_text())["id"] for path in published}

    def verdicts(self):
        """What the store says of every artifact."""
        found = (self.folder / "store/evaluations").glob("*/*.json")
        return {p.parent.name: json.loads(p.read_text()).get("predicate", {}).get("verdict") for p in found}


def processor_seconds():
    """What the processes that this one has waited for have computed so far."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    with warm_python(tmp_path_factory.mktemp("warm")) as folder:
        yield folder


@pytest.fixture(scope="module")
def project(tmp_path_factory, programs):
    project = Project(tmp_path_factory.mktemp("build") / "ingot", programs)
    project.first = project.repro()
    return project


@pytest.mark.timeout(900)
def test_the_rows_of_the_acceptance_list(project, programs):
    """In an order that shares work. Each block is one row: edit, `dvc repro`, which stages ran."""
    key = f"{C}-w4a16-1-kv16"
    assert project.first == SHARED | W4A16
    first = project.ids()

    # nothing -> compose only
    project.use(Path(sys.executable).parent)
    started, computed = time.monotonic(), processor_seconds()
    assert project.repro() == set()
    # On a machine that does other things too, what counts is what it computes itself.
    project.nothing_took = min(time.monotonic() - started, processor_seconds() - computed)
    project.use(programs)

    # a comment -> compose
    project.edit("conf/weights/w4a16.yaml", "name:", "# said otherwise\nname:")
    assert project.repro() == set()

    # a removed or edited slice -> healed
    slices = project.folder / "build/slices"
    before = {path: path.read_bytes() for path in slices.rglob("*.json")}
    (slices / f"export/{key}.json").unlink()
    (slices / f"shard/{C}-w4a16-1.json").unlink()
    (slices / f"shard/{C}-w4a16-1.json").write_text("{}")
    assert project.repro() == set()
    assert {path: path.read_bytes() for path in slices.rglob("*.json")} == before

    # a recipe added -> only the new
    project.select("[fp16, w4a16]")
    assert project.repro() == FP16
    both = project.ids()
    assert both[key] == first[key] and len(set(both.values())) == 2

    # a weights option -> quantize, shard, export, evaluate (and publish) of that recipe
    project.select("[fp16, w4a16]", "weights.search=none")
    assert project.repro() == W4A16
    assert project.ids()[key] != both[key]

    # revert -> all from the run cache; publish puts the record in the store right
    project.select("[fp16, w4a16]")
    assert project.repro() == {PUBLISH_W4A16}
    assert project.ids() == both

    # one line of the calibration text -> its calibrate and below, fp16 ids unchanged
    text = project.folder / "demo/text/calibration.txt"
    original = text.read_text()
    text.write_text("A line that was not there before, long enough to be seen. " * 20 + "\n" + original)
    below = {f"{stage}@{C}-fp16-1-kv16" for stage in ("export", "evaluate")}
    assert project.repro() == {f"calibrate@{C}", *W4A16, f"quantize@{C}-fp16", *below}
    assert project.ids()[f"{C}-fp16-1-kv16"] == both[f"{C}-fp16-1-kv16"]
    assert project.ids()[key] != both[key]
    text.write_text(original)

    # another torch version -> all that computes, to the same ids
    fake = project.folder / "build/other/torch-9.9.9.dist-info"
    fake.mkdir(parents=True)
    (fake / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 9.9.9\n")
    computing = {*SHARED, f"quantize@{C}-w4a16", *(f"evaluate@{C}-{w}-1-kv16" for w in ("fp16", "w4a16"))}
    assert project.repro(PYTHONPATH=str(fake.parent)) == {*computing, PUBLISH_FP16, PUBLISH_W4A16}
    assert project.ids() == both

    # a line of a recipe's code -> that recipe only (its output is the same, so nothing after it)
    project.edit("pipelines/quant/w4a16/awq.py", "from __future__", "# said otherwise\nfrom __future__")
    assert project.repro() == {f"quantize@{C}-w4a16", PUBLISH_FP16, PUBLISH_W4A16}
    assert project.ids() == both

    # recipes removed -> nothing
    project.select("[fp16]")
    assert project.repro() == set()

    # a model field used by interpolation -> that model
    project.edit("conf/evaluation/demo.yaml", "name: demo", "name: ${model.name}_set")
    project.edit("conf/model/demo.yaml", "name: demo", "name: other")
    assert project.repro() == {f"{stage}@{C}-fp16-1-kv16" for stage in ("export", "evaluate", "publish")}

    # one target after an edit of conf/ -> compose and what it needs
    project.select("[fp16]", "calibration.seed=7", "evaluation.max_tokens=160")
    assert project.repro(f"quantize@{C}-fp16") == {f"calibrate@{C}", f"quantize@{C}-fp16"}

    # one byte of the checkpoint -> all of that model
    (project.folder / "demo/model/tokenizer_config.json").open("a").write("\n")
    assert project.repro() == SHARED | FP16


def test_nothing_to_do_takes_under_five_seconds(project):
    if not hasattr(project, "nothing_took"):
        pytest.skip("measured by the test before")
    assert project.nothing_took < 5


@pytest.mark.timeout(600)
def test_a_build_of_its_own_finds_what_is_built_and_leaves_the_project_alone(project):
    project.select("[fp16]")
    project.repro()
    (key, identity), *_ = [item for item in project.ids().items() if "fp16" in item[0]]
    files = lambda: (path for path in (project.folder / "build").rglob("*") if path.is_file())  # noqa: E731
    before = {path: path.stat().st_mtime_ns for path in files()}
    selection = (project.folder / "params.yaml").read_bytes()
    done = subprocess.run(
        [sys.executable, "-m", "pipelines.build", "weights=fp16", *SMALL],
        cwd=project.folder,
        env=project.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [identity, done.stdout.split()[1], key]
    ran = re.findall(r"^Running stage '(.+)':$", done.stderr, re.MULTILINE)
    assert ran == ["compose", f"publish@{key}"], done.stderr
    page = project.folder / "build/reports" / key
    assert {path: path.stat().st_mtime_ns for path in files() if page not in path.parents} == before
    assert sorted(path.name for path in page.iterdir()) == sorted(["index.html", f"{identity[:12]}.html"])
    assert (project.folder / "params.yaml").read_bytes() == selection
    again = [sys.executable, "-m", "pipelines.build", "--check", identity[:12]]
    done = subprocess.run(
        again, cwd=project.folder, env=project.environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, f"equal {identity}\n"), done.stderr


def killed_build(folder, programs, *, kills, seed):
    """A build killed at random times, continued each time, and at last left alone.

    dvc writes two files of its own in place; killed just then it asks to repair them, which `ingot verify` does.
    """
    project, moments = Project(folder), random.Random(seed)
    done = 0
    while done < kills:
        process = project.start()
        try:
            process.communicate(timeout=moments.uniform(1, 12))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            done += 1
            mend(folder)
            continue
        # It came to its end before the kill: begin another one, with everything to do.
        assert process.returncode == 0
        for name in ("build", ".dvc/cache", "dvc.lock"):
            subprocess.run(["rm", "-rf", name], cwd=project.folder, check=True)
    project.use(programs)
    project.repro()
    left = [path for path in (project.folder / "build").rglob("*.tmp-*") if path.parent.name != "slices"]
    return project, left


@pytest.mark.timeout(900)
def test_a_build_in_another_folder_killed_twice_ends_with_the_same_ids(tmp_path, project, programs):
    killed, left = killed_build(tmp_path / "elsewhere", programs, kills=2, seed=int(time.time()))
    again = Project(tmp_path / "again", programs)
    again.repro()
    assert killed.ids() == again.ids()
    assert not left


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_twenty_kills_each_followed_by_a_repro_end_with_the_same_ids(tmp_path, programs, soak_row):
    whole = Project(tmp_path / "whole", programs)
    whole.repro()
    for number in range(20):
        killed, left = killed_build(tmp_path / f"killed{number}", programs, kills=1, seed=number)
        soak_row["count"] += 1
        soak_row["failures"] += killed.ids() != whole.ids() or bool(left)
    assert soak_row == {"count": 20, "failures": 0}
