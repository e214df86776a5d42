import json
import os
import shutil
import subprocess
import sys
from operator import itemgetter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config import Recipe
from engine.storage.artifacts import (
    MANIFEST,
    ArtifactError,
    canonical_json,
    read_manifest,
    verify,
    write_manifest,
)
from tests.engine.storage.tiny_artifact import DIGEST, make_artifact

FILES = ("triton_models/tokenizer/tokenizer.json", "triton_models/weights/a.weight", "triton_models/weights/config.ini")


def test_canonical_json_is_one_form():
    assert canonical_json({"b": [1, 2.5], "a": "é"}) == '{"a":"é","b":[1,2.5]}\n'.encode()
    with pytest.raises(ValueError):
        canonical_json(float("nan"))


def test_the_id_is_the_digest_of_what_the_artifact_is(tmp_path):
    first, second = make_artifact(tmp_path / "a"), make_artifact(tmp_path / "elsewhere" / "b")
    assert first == second == read_manifest(tmp_path / "a").id and len(first) == 64
    others = {
        make_artifact(tmp_path / "c", content=b"other"),
        make_artifact(tmp_path / "d", recipe=Recipe(kv="kv8")),
        make_artifact(tmp_path / "e", tp=2),
        make_artifact(tmp_path / "f", calibration={"declared": DIGEST, "blocks": DIGEST}),
        make_artifact(tmp_path / "g", chat_template=DIGEST),
        make_artifact(tmp_path / "h", sources={"config.json": "0" * 64}),
    }
    assert len(others - {first}) == 6


def test_a_manifest_says_finer_kv_scales_than_turbominds(tmp_path):
    ids = {make_artifact(tmp_path / name, recipe=Recipe(kv="kv8", kv_granularity=name)) for name in ("token", "tensor")}
    assert len(ids) == 2
    manifest = read_manifest(tmp_path / "token")
    assert manifest.recipe == Recipe(kv="kv8", kv_granularity="token") and str(manifest.recipe) == "fp16-kv8-token"
    # Artifacts from before there was a choice have the same form as TurboMind's.
    content = json.loads((tmp_path / "tensor" / MANIFEST).read_text())
    assert content["recipe"] == {"weights": "fp16", "kv": "kv8", "group_size": 0}
    assert str(read_manifest(tmp_path / "tensor").recipe) == "fp16-kv8"


def test_the_id_does_not_hang_on_times_or_modes(tmp_path):
    before = make_artifact(tmp_path / "a")
    for path in (tmp_path / "a").rglob("*.weight"):
        path.chmod(0o444)
        os.utime(path, (1, 1))
    assert make_artifact(tmp_path / "a", only_manifest=True) == before


def test_the_manifest_says_what_is_there(tmp_path):
    artifact_id = make_artifact(tmp_path / "a")
    manifest = verify(tmp_path / "a", artifact_id)
    assert [entry.path for entry in manifest.files] == sorted(FILES)
    assert manifest.size == sum((tmp_path / "a" / path).stat().st_size for path in FILES)
    assert (manifest.recipe, manifest.tp) == (Recipe(weights="w4a16", group_size=32), 1)
    assert manifest.recipe.fields() == {"weights": "w4a16", "kv": "kv16", "group_size": 32}
    assert json.loads((tmp_path / "a" / MANIFEST).read_bytes())["format"] == 2


def _flip(path, at):
    raw = bytearray(path.read_bytes())
    raw[at % len(raw)] ^= 1 << (at % 8)
    path.write_bytes(raw)
    return path


def _truncate(path, at):
    path.write_bytes(path.read_bytes()[: at % path.stat().st_size])
    return path


def _grow(path, at):
    path.write_bytes(path.read_bytes() + b"\0" * (1 + at % 3))
    return path


def _remove(path, at):
    path.unlink()
    return path


def _add(path, at):
    extra = path.parent / f"extra{at}"
    extra.write_bytes(b"")
    return extra


def _link(path, at):
    content = path.parent.parent.parent.parent / f"moved{at}"
    shutil.copyfile(path, content)
    path.unlink()
    path.symlink_to(content)
    return path


@given(
    name=st.sampled_from([*FILES, MANIFEST]),
    damage=st.sampled_from([_flip, _truncate, _grow, _remove, _add, _link]),
    at=st.integers(0, 10_000),
)
@settings(max_examples=150, deadline=None)
def test_any_damage_is_found_and_named(tmp_path_factory, name, damage, at):
    folder = tmp_path_factory.mktemp("artifact") / "x" / "a"
    artifact_id = make_artifact(folder)
    touched = damage(folder / name, at)
    with pytest.raises(ArtifactError) as error:
        verify(folder, artifact_id)
    assert touched.name in str(error.value)


def test_all_damage_is_told_at_once_and_settings_have_another_way(tmp_path):
    artifact_id = make_artifact(tmp_path / "a")
    _flip(tmp_path / "a" / FILES[1], 3)
    _flip(tmp_path / "a" / FILES[2], 3)
    (tmp_path / "a" / FILES[0]).unlink()
    with pytest.raises(ArtifactError) as error:
        verify(tmp_path / "a", artifact_id)
    assert all(path in str(error.value) for path in FILES)
    assert "serve.session_len" in str(error.value)


def test_another_artifact_is_not_the_one_asked_for(tmp_path):
    make_artifact(tmp_path / "a")
    with pytest.raises(ArtifactError, match="instead of " + "0" * 64):
        verify(tmp_path / "a", "0" * 64)


def _edit(folder, change):
    content = json.loads((folder / MANIFEST).read_bytes())
    change(content)
    (folder / MANIFEST).write_bytes(canonical_json(content))


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "a/../../x", "a//b", "./a", "a\\b", "a\nb", "", MANIFEST])
def test_a_manifest_cannot_lead_out_of_the_artifact(tmp_path, path):
    make_artifact(tmp_path / "a")
    entry = {"path": path, "size": 0, "sha256": DIGEST}
    _edit(
        tmp_path / "a", lambda content: content.update(files=sorted([*content["files"], entry], key=itemgetter("path")))
    )
    with pytest.raises(ArtifactError, match="names a file that it may not"):
        read_manifest(tmp_path / "a")


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.update(format=3),
        lambda content: content.pop("recipe"),
        lambda content: content["recipe"].update(colour="red"),
        lambda content: content["recipe"].update(kv_granularity="page"),
        lambda content: content["files"].reverse(),
        lambda content: content["files"].append(content["files"][0]),
        lambda content: content["files"][0].update(size=-1),
        lambda content: content["files"][0].update(sha256="0"),
        lambda content: content.update(files=[1]),
    ],
)
def test_a_manifest_of_another_form_is_refused(tmp_path, change):
    make_artifact(tmp_path / "a")
    _edit(tmp_path / "a", change)
    with pytest.raises(ArtifactError, match=MANIFEST):
        read_manifest(tmp_path / "a")


@pytest.mark.parametrize("raw", [b"", b"[]", b"\xff", b"{", b"[" * 100_000, b"null\n"])
def test_a_manifest_that_is_none_is_refused(tmp_path, raw):
    make_artifact(tmp_path / "a")
    (tmp_path / "a" / MANIFEST).write_bytes(raw)
    with pytest.raises(ArtifactError, match=MANIFEST):
        read_manifest(tmp_path / "a")


def test_only_regular_files_become_an_artifact(tmp_path):
    make_artifact(tmp_path / "a")
    (tmp_path / "a" / "nothing").mkdir()
    (tmp_path / "a" / "there").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "a" / "pipe")
    with pytest.raises(ArtifactError) as error:
        make_artifact(tmp_path / "a", only_manifest=True)
    for words in ("nothing is an empty folder", "there is a link", "pipe is not a regular file"):
        assert words in str(error.value)


def test_a_new_manifest_leaves_links_to_the_old_one_alone(tmp_path):
    make_artifact(tmp_path / "a")
    (tmp_path / "kept").hardlink_to(tmp_path / "a" / MANIFEST)
    before = (tmp_path / "kept").read_bytes()
    (tmp_path / "a" / FILES[1]).write_bytes(b"new")
    make_artifact(tmp_path / "a", only_manifest=True)
    assert (tmp_path / "kept").read_bytes() == before


def test_wrong_digests_are_refused_by_name(tmp_path):
    make_artifact(tmp_path / "a")
    with pytest.raises(ArtifactError, match="the digest of blocks is 'abc'"):
        make_artifact(tmp_path / "b", calibration={"declared": DIGEST, "blocks": "abc"})


@pytest.mark.parametrize("calibration", [DIGEST, ["a"], {"blocks": 1}, {"blocks": "abc"}, 7])
def test_a_manifest_with_another_calibration_than_digests_by_name_is_refused(tmp_path, calibration):
    make_artifact(tmp_path / "a")
    path = tmp_path / "a" / MANIFEST
    path.write_bytes(canonical_json(json.loads(path.read_bytes()) | {"calibration": calibration}))
    with pytest.raises(ArtifactError, match="is not a manifest that can be read"):
        read_manifest(tmp_path / "a")


def test_a_manifest_of_the_format_before_says_so(tmp_path):
    make_artifact(tmp_path / "a")
    path = tmp_path / "a" / MANIFEST
    path.write_bytes(canonical_json(json.loads(path.read_bytes()) | {"format": 1}))
    with pytest.raises(ArtifactError, match="has format 1; this version reads format 2"):
        read_manifest(tmp_path / "a")


def test_files_that_were_hashed_while_they_were_written_are_not_read_again(tmp_path):
    folder = tmp_path / "a"
    artifact_id = make_artifact(folder)
    written = [entry for entry in read_manifest(folder).files if entry.path in FILES[:2]]
    (folder / FILES[1]).write_bytes(b"x" * written[1].size)
    assert make_artifact(folder, only_manifest=True, written=written) == artifact_id
    with pytest.raises(ArtifactError, match=r"a\.weight has changed"):
        verify(folder, artifact_id)
    (folder / FILES[1]).write_bytes(b"of another length")
    with pytest.raises(ArtifactError, match=r"a\.weight is not as it was written, 1200 bytes long"):
        make_artifact(folder, only_manifest=True, written=written)


def test_no_artifact_is_an_error(tmp_path):
    with pytest.raises(ArtifactError, match="is not an artifact"):
        verify(tmp_path)
    with pytest.raises(ArtifactError, match="is not a folder"):
        write_manifest(tmp_path / "none", recipe=Recipe(), sources={}, calibration=None, chat_template=None, tp=1)


@pytest.mark.parametrize("module", ["artifacts", "store", "config_ini"])
def test_what_the_command_line_needs_is_free_of_torch(module):
    code = f"import sys, engine.storage.{module}; sys.exit('torch' in sys.modules or 'dvc' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
