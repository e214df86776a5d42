"""`ingot report`: what there is to see of an artifact, read from real stages of a tiny model."""

import dataclasses
import html.parser
import json
import math
import re
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest

from engine.models import names
from engine.storage.artifacts import read_manifest
from engine.storage.workspace import Workspace
from pipelines import report
from pipelines.diagnostics.findings import LEVELS, _unquantized, collect
from pipelines.diagnostics.page import page
from pipelines.slices import write_json
from tests.pipelines.built import project_folder, write_built
from tests.pipelines.chain import Chain, tiny_rows
from tests.pipelines.stage import bytes_of
from tests.pipelines.tiny_checkpoint import TEXT, write_tiny_checkpoint

FP16, W4A16, W8A8 = "tiny-c-fp16-1-kv16", "tiny-c-w4a16-1-kv8", "tiny-c-w8a8-1-kv8"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A project in which two artifacts are built, and their slices written."""
    root = tmp_path_factory.mktemp("report")
    (root / "text.txt").write_text(TEXT)
    checkpoint = write_tiny_checkpoint(root / "model")
    rows = tiny_rows(checkpoint, root / "text.txt", [("fp16", "kv16"), ("w4a16", "kv8"), ("w8a8", "kv8")])
    chain = Chain(root / "chain", rows, project=root)
    for name, content in chain.slices.items():
        write_json(chain.root / f"build/slices/{name}.json", content)
    for key in (FP16, W4A16, W8A8):
        chain.artifact(key)
    return project_folder(chain.root)


def test_findings_are_those_of_the_stages(root):
    found = collect(root, W4A16)
    rows = json.loads((root / "build/quantize/tiny-c-w4a16/report.json").read_text())["pairs"]
    assert found.errors == rows and len(rows) == 8
    assert set(found.weights) == set(names.LINEARS) and set(found.outliers) == {row["pair"] for row in rows}
    assert all(len(values) == 2 and all(0.01 < v < 0.5 for v in values) for values in found.weights.values())
    assert all(before >= 1 and after >= 1 for pairs in found.outliers.values() for before, after in pairs)
    for what in "KV":
        for (layer, least), (head, least_of_head) in zip(
            found.levels[what, "layer"], found.levels[what, "head"], strict=True
        ):
            assert 0 < least <= layer <= LEVELS and layer <= head <= LEVELS * 1.0001 and least <= least_of_head
    assert found.unquantized == [] and found.notes == []
    assert set(found.runs) == {"calibrate", "quantize"}
    assert found.runs["quantize"]["measured"]["seconds"] > 0


def test_scaling_that_was_chosen_shows_in_the_outliers(root):
    """Where activation's exponent is 0 in a pair of linears nothing changes; else large channels come down."""
    found = collect(root, W4A16)
    changed = 0
    for row in found.errors:
        before, after = found.outliers[row["pair"]][row["layer"]]
        if row["activation_exponent"] == row["weight_exponent"] == 0:
            assert after == pytest.approx(before, rel=1e-3)
        else:
            changed += after < before
    assert changed


def test_linears_that_stayed_floats_are_listed(root):
    left = list(_unquantized(Workspace(root / "build/export" / FP16)))
    assert left[0] == "model.layers.0.self_attn.q_proj" and len(left) == 2 * len(names.LINEARS)
    found = collect(root, W4A16)
    found.unquantized = left[:2]
    text = page(found, "a" * 64, "pass")
    assert "2 linears of decoder layers stayed floats" in text and left[1] in text


def test_without_the_checkpoint_the_rest_is_shown(root, tmp_path):
    shutil.copytree(root / "build", tmp_path / "build")
    (tmp_path / "build/paths.json").write_text("{}")
    found = collect(tmp_path, W4A16)
    assert found.errors and found.levels and not found.weights and "which is not here" in found.notes[0]
    assert "which is not here" in page(found, "a" * 64, None)


class Tags(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.seen = []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))


@pytest.mark.parametrize("key", [FP16, W4A16, W8A8])
def test_the_page_needs_nothing_else_and_its_figures_are_whole(root, key):
    text = page(collect(root, key), read_manifest(root / "build/export" / key).id, "fail")
    tags = Tags()
    tags.feed(text)
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in tags.seen}
    assert not [name for _, attrs in tags.seen for name in attrs if name in ("src", "href", "onload")]
    assert "url(" not in text and "@import" not in text and "http" not in text
    figures = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(figures) == (2 if key == FP16 else 4 + 4 + 1 + 2)
    assert all(ElementTree.fromstring(figure) is not None for figure in figures)
    assert "nan" not in re.sub(r"<style>.*</style>", "", text, flags=re.DOTALL).replace("finance", "")
    assert 'class="warn">Evaluation: fail' in text and read_manifest(root / "build/export" / key).id in text


def test_rows_of_another_recipe_are_shown_by_their_own_columns(root):
    found = collect(root, W4A16)
    pairs = list(dict.fromkeys(row["pair"] for row in found.errors))
    found.errors = [
        {"layer": layer, "pair": pair, "alpha": 0.75, "error_unsmoothed": 0.2, "error": 0.1 if layer else math.nan}
        for layer in (0, 1)
        for pair in pairs
    ]
    text = page(found, "a" * 64, "pass")
    found.options["kv"] = {"name": "kv8", "granularity": "head"}
    assert "keeps them as kv8 (granularity: head)" in page(found, "a" * 64, "pass")
    assert "before smoothing" in text and "<th class=n>alpha" in text and "0.75" in text
    assert "before scaling" not in text and text.count("<td class=n>-") >= len(pairs)


def test_an_output_matrix_that_is_quantized_is_said(root):
    found = collect(root, W4A16)
    assert "embedding, output matrix, norms" in page(found, "a" * 64, "pass")
    found.manifest = dataclasses.replace(found.manifest, recipe=dataclasses.replace(found.manifest.recipe, head="int4"))
    found.head = {"head": "int4", "error": 0.00125}
    text = page(found, "a" * 64, "pass")
    assert "The output matrix is int4, with an error of outputs of 1.25e-03" in text and "embedding, norms" in text


def test_what_is_shown_is_escaped(root):
    found = collect(root, W4A16)
    found.calibration = {"<script>alert(1)</script>": ["<b>"]}
    found.notes = ["<i>x"]
    text = page(found, "a" * 64, "pass")
    assert "<script>" not in text and "<b>" not in text and "&lt;i&gt;x" in text


def test_the_command_writes_pages_and_changes_no_output(root, monkeypatch, capsys):
    monkeypatch.chdir(root)
    before = bytes_of(root / "build")
    assert report.main([W4A16]) == 0
    path = Path(capsys.readouterr().out.strip())
    assert path == root / f"build/reports/{W4A16}/index.html"
    assert report.main([]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3
    after = bytes_of(root / "build")
    assert {name: after[name] for name in before} == before
    assert all(name.startswith("reports/") for name in after.keys() - before.keys())


def test_what_is_not_built_is_said_in_one_paragraph(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(project_folder(tmp_path))
    assert report.main([]) == 1
    assert "nothing has been built yet" in capsys.readouterr().err
    write_built(tmp_path, W4A16)
    assert report.main(["other-c-fp16-1-kv16"]) == 1
    assert f"other-c-fp16-1-kv16 is not built here: there are {W4A16}." in capsys.readouterr().err
    assert report.main([W4A16]) == 1
    assert f"{W4A16} is not built as far as export" in capsys.readouterr().err
