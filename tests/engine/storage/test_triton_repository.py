import shutil
from pathlib import Path

import pytest

from engine.storage.artifacts import ArtifactError, verify
from engine.storage.triton_repository import LINKS, link_repository, repository_files, verify_deployed, write_repository
from tests.tiny_artifact import write_tiny_artifact
from tests.triton_stand_in import datatype, read_config

TINY = {"model_name": "tiny", "tp": 1}


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("artifact") / "tiny"
    return folder, write_tiny_artifact(folder)


@pytest.fixture
def deployed(artifact, tmp_path):
    """A copy with the reference's links, and the artifact's id."""
    folder = tmp_path / "deployed"
    shutil.copytree(artifact[0], folder)
    link_repository(folder)
    return folder, artifact[1]


def test_every_configuration_is_triton_s_own_text_format(artifact):
    configs = {path.parent.name: read_config(path) for path in artifact[0].glob("*/*/config.pbtxt")}
    assert set(configs) == {"turbomind", "interactive", "preprocessing", "postprocessing"}
    engine = configs["interactive"]
    assert (engine.name, engine.backend, engine.max_batch_size) == ("turbomind", "python", 1)
    assert engine.model_transaction_policy.decoupled and engine.instance_group[0].count == 1
    parameters = {name: value.string_value for name, value in engine.parameters.items()}
    assert parameters == {
        "workspace_path": "../..",
        "engine": "{}",
        "tensor_para_size": "1",
        "model_name": "tiny",
    }
    required = {each.name: (datatype(each), list(each.dims)) for each in engine.input if not each.optional}
    assert required == {
        "input_ids": ("UINT32", [-1]),
        "input_lengths": ("UINT32", [1]),
        "request_output_len": ("UINT32", [-1]),
    }
    kinds = {each.name: datatype(each) for each in engine.input if each.optional}
    assert kinds == {
        **dict.fromkeys(("step", "START", "END", "STOP"), "INT32"),
        **dict.fromkeys(("session_len", "runtime_top_k"), "UINT32"),
        **dict.fromkeys(("runtime_top_p", "temperature", "repetition_penalty"), "FP32"),
        **dict.fromkeys(("random_seed", "CORRID"), "UINT64"),
    }
    assert [each.name for each in engine.output] == ["output_ids", "sequence_length"]


@pytest.mark.parametrize("name", ["internlm-chat-7b", 'a "quoted" \\ name', "书生"])
def test_name_and_tp_arrive(tmp_path, name):
    write_repository(tmp_path, model_name=name, tp=4)
    parameters = read_config(tmp_path / "triton_models/interactive/config.pbtxt").parameters
    assert parameters["model_name"].string_value == name
    assert parameters["tensor_para_size"].string_value == "4"


def test_an_artifact_has_regular_files_under_both_names(artifact):
    folder, artifact_id = artifact
    files = {entry.path: entry.sha256 for entry in verify(folder, artifact_id).files}
    written = repository_files(**TINY)
    assert len(written) == 12 and set(written) <= set(files)
    for name, content in written.items():
        assert (folder / name).read_bytes() == content
        assert str(Path.cwd()).encode() not in content
    for link, target in LINKS.items():
        if link.startswith("model_repository"):
            copy = (Path(link).parent / target / "config.pbtxt").as_posix().replace("model_repository/../", "")
            assert files[f"{link}/config.pbtxt"] == files[copy]


def test_links_are_the_reference_s(deployed):
    folder, _ = deployed
    found = {
        path.relative_to(folder).as_posix(): path.readlink().as_posix()
        for path in folder.rglob("*")
        if path.is_symlink()
    }
    assert found == {
        "model_repository/turbomind": "../triton_models/interactive",
        "model_repository/preprocessing": "../triton_models/preprocessing",
        "model_repository/postprocessing": "../triton_models/postprocessing",
        "triton_models/interactive/1/weights": "../../weights",
        "triton_models/preprocessing/1/tokenizer": "../../tokenizer",
        "triton_models/postprocessing/1/tokenizer": "../../tokenizer",
    }
    assert (folder / "model_repository/turbomind/1/weights/config.ini").is_file()
    assert (folder / "model_repository/preprocessing/1/tokenizer/tokenizer.json").is_file()
    link_repository(folder)
    assert (folder / "model_repository/turbomind").is_symlink()


def test_a_workspace_without_the_repository_gets_no_link(tmp_path):
    (tmp_path / "triton_models/weights").mkdir(parents=True)
    link_repository(tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_symlink()]


def test_what_triton_needs_may_change_and_what_the_engine_reads_may_not(deployed):
    folder, artifact_id = deployed
    (folder / "triton_models/interactive/1/__pycache__").mkdir()
    (folder / "triton_models/interactive/config.pbtxt").write_text("# for this machine")
    assert verify_deployed(folder, **TINY) == artifact_id
    weights, tokenizer = folder / "triton_models/weights", folder / "triton_models/tokenizer"
    with (weights / "norm.weight").open("r+b") as file:
        file.write(b"\1")
    (weights / "layers.0.ffn_norm.weight").unlink()
    (tokenizer / "added.json").write_text("{}")
    with pytest.raises(ArtifactError) as caught:
        verify_deployed(folder, **TINY)
    for problem in ("weights/norm.weight has changed", "0.ffn_norm.weight is missing", "added.json is not in the"):
        assert problem in str(caught.value)
    assert str(caught.value).count(";") == 2


def test_a_plain_folder_has_no_id_and_a_foreign_configuration_is_refused(deployed):
    folder, _ = deployed
    (folder / "manifest.json").unlink()
    assert verify_deployed(folder, **TINY) is None
    for changed in ({"tp": 2}, {"model_name": "other"}):
        with pytest.raises(ArtifactError, match="different workspaces"):
            verify_deployed(folder, **TINY | changed)
