import json

import pytest
import torch

from engine.config import EngineConfig, Sampling
from engine.runtime.deployment import deployed_config, open_deployed
from engine.storage.artifacts import ArtifactError
from tests.tiny_artifact import write_tiny_artifact

OPTIONS = '{"device": "cpu", "max_batch_size": 2, "cache_max_entry_count": "2MB"}'


@pytest.fixture(scope="module")
def deployed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deployed")
    return folder, write_tiny_artifact(folder)


def test_an_artifact_is_verified_and_opened_with_the_servers_options(deployed):
    folder, artifact_id = deployed
    engine, found = open_deployed(folder, OPTIONS, model_name="tiny", tp=1)
    assert found == artifact_id
    assert engine.session_len == 128
    assert engine._scheduler._max_batch_size == 2
    [answer] = engine.generate([[5, 6, 7]], Sampling(temperature=0, max_new_tokens=4, ignore_eos=True))
    assert len(answer.token_ids) == 4


def test_a_folder_of_another_model_or_tp_is_refused(deployed):
    folder, _ = deployed
    for name, tp in (("huge", 1), ("tiny", 2)):
        with pytest.raises(ArtifactError, match=r"config\.pbtxt says .*belong to different workspaces"):
            open_deployed(folder, OPTIONS, model_name=name, tp=tp)


def test_a_wrong_option_is_said_before_anything_is_hashed(tmp_path):
    with pytest.raises(ValueError, match="cache_max_entry_count is '2 mb', but must be"):
        open_deployed(tmp_path, '{"cache_max_entry_count": "2 mb"}', model_name="tiny", tp=1)
    with pytest.raises(ValueError, match=r"options are \{\"batch\": 2\}, but must be a JSON object of: device, dtype"):
        deployed_config('{"batch": 2}')


def test_without_a_device_a_gpu_is_taken_where_there_is_one(monkeypatch):
    for here, device in ((False, "cpu"), (True, "cuda")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda here=here: here)
        assert deployed_config("{}") == EngineConfig(device=device)
        assert deployed_config(json.dumps({"device": "cuda:1"})) == EngineConfig(device="cuda:1")
