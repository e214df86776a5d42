"""The three model.py on a stand-in for Triton's Python backend: no Triton server runs here."""

import json
import shutil

import numpy as np
import pytest

from engine.config import EngineConfig, Sampling
from engine.runtime.deployment import deployed_config
from engine.runtime.engine import Engine
from engine.runtime.tokenizer import Tokenizer
from engine.storage.artifacts import ArtifactError
from engine.storage.triton_repository import link_repository, write_repository
from engine.storage.workspace import TOKENIZER
from tests.tiny_artifact import SESSION_LEN, write_tiny_artifact
from tests.triton_stand_in import Logger, Model, Triton

KINDS = {
    **dict.fromkeys(("input_lengths", "request_output_len", "runtime_top_k", "session_len"), np.uint32),
    **dict.fromkeys(("step", "START", "END", "STOP", "CHAT"), np.int32),
    **dict.fromkeys(("random_seed", "CORRID"), np.uint64),
    **dict.fromkeys(("runtime_top_p", "temperature", "repetition_penalty"), np.float32),
}


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("artifact") / "tiny"
    write_tiny_artifact(folder)
    return folder


@pytest.fixture(scope="module", params=["artifact", "export"])
def triton(request, artifact, tmp_path_factory):
    """The models of an artifact, and of a copy with the reference's links."""
    folder = artifact
    if request.param == "export":
        folder = tmp_path_factory.mktemp("export") / "tiny"
        shutil.copytree(artifact, folder)
        link_repository(folder)
    with Triton(folder / "model_repository") as triton:
        yield triton


def scalars(**values):
    return {name: np.array([[value]], dtype=KINDS[name]) for name, value in values.items()}


def round_of(triton, ids, *, output_len=6, **values):
    """(the last update, the error) of one round, each update checked."""
    last, error = [], None
    arrays = {"input_ids": np.array([ids], dtype=np.uint32)}
    lengths = scalars(input_lengths=len(ids), request_output_len=output_len)
    for outputs, error in triton.infer("turbomind", **(arrays | lengths | scalars(**values))):
        if error is None:
            ids, length = outputs["output_ids"], outputs["sequence_length"]
            assert ids.shape == (1, 1, length.item()) and length.shape == (1, 1)
            assert ids.ravel().tolist()[: len(last)] == last
            last = ids.ravel().tolist()
    return last, error


def test_text_goes_through_all_three(triton, artifact):
    tokenizer = Tokenizer(artifact / TOKENIZER)
    query = np.array([[b"the cat sat"]], dtype=object)
    [(outputs, error)] = triton.infer("preprocessing", QUERY=query)
    ids = outputs["INPUT_ID"][0].tolist()
    assert error is None and ids == tokenizer.encode("the cat sat")
    assert outputs["REQUEST_INPUT_LEN"].tolist() == [[len(ids)]]
    tokens, error = round_of(triton, ids)
    [expected] = Engine.from_workspace(artifact, EngineConfig()).generate(
        [ids], Sampling(temperature=0.0, max_new_tokens=6)
    )
    assert error is None and tokens == [*ids, *expected.token_ids]
    answer = np.array([[tokens[len(ids) :]]], dtype=np.uint32)
    length = np.array([[answer.size]], dtype=np.uint32)
    [(outputs, error)] = triton.infer("postprocessing", TOKENS_BATCH=answer, sequence_length=length)
    assert outputs["OUTPUT"].shape == (1, 1, 1)
    assert outputs["OUTPUT"].item().decode() == tokenizer.decode(answer.ravel().tolist())


def test_postprocessing_cuts_every_row_at_its_length(triton, artifact):
    tokenizer = Tokenizer(artifact / TOKENIZER)
    rows = np.array([[[40, 41, 42], [50, 51, 52]]], dtype=np.uint32)
    length = np.array([[1, 3]], dtype=np.uint32)
    [(outputs, _)] = triton.infer("postprocessing", TOKENS_BATCH=rows, sequence_length=length)
    texts = [text.decode() for text in outputs["OUTPUT"].ravel()]
    assert texts == [tokenizer.decode([40]), tokenizer.decode([50, 51, 52])]
    [(_, error)] = triton.infer("postprocessing", TOKENS_BATCH=rows, sequence_length=length + 1)
    assert "does not fit" in error


def test_messages_go_into_the_chat_template(triton, artifact):
    messages = [{"role": "user", "content": "the cat"}]
    query = np.array([[json.dumps(messages).encode()]], dtype=object)
    [(outputs, _)] = triton.infer("preprocessing", QUERY=query, **scalars(CHAT=1))
    assert outputs["INPUT_ID"][0].tolist() == Tokenizer(artifact / TOKENIZER).encode_chat(messages)
    for text, message in ((b"{}", "JSON list"), (b"\xff", "codec"), (b"nonsense", "Expecting value")):
        [(_, error)] = triton.infer("preprocessing", QUERY=np.array([[text]], dtype=object), **scalars(CHAT=1))
        assert message in error
    [(_, error)] = triton.infer("preprocessing", QUERY=np.array([[b"a", b"b"]], dtype=object))
    assert "2 texts" in error


def test_a_session_goes_on_rewinds_and_ends(triton):
    first, _ = round_of(triton, [2, 3, 4], CORRID=2**63, START=1)
    second, _ = round_of(triton, [5], CORRID=2**63)
    assert second[: len(first) + 1] == [*first, 5]
    third, _ = round_of(triton, [5], CORRID=2**63, step=4, END=1)
    assert third[:5] == [*first[:4], 5]
    _, error = round_of(triton, [5], CORRID=2**63)
    assert "no session 9223372036854775808" in error


def test_stop_reaches_a_running_round(triton):
    running = triton.infer(
        "turbomind",
        input_ids=np.array([[2, 3]], dtype=np.uint32),
        **scalars(input_lengths=2, request_output_len=SESSION_LEN - 3, CORRID=5, START=1),
    )
    next(running)
    stopped, error = round_of(triton, [0], CORRID=5, STOP=1, END=1)
    last = list(running)[-1][0]["sequence_length"].item()
    # The model may have come to its own end before the stop: then there is nothing to stop, but END is obeyed.
    assert error is None and len(stopped) == last <= SESSION_LEN - 1
    assert "no session 5" in round_of(triton, [2], CORRID=5)[1]


def test_sampling_arrives(triton):
    def drawn(**values):
        return round_of(triton, [2, 3], output_len=12, runtime_top_p=1.0, temperature=3.0, **values)[0]

    assert drawn(random_seed=2**64 - 1) == drawn(random_seed=2**64 - 1)
    assert len({tuple(drawn(random_seed=seed)) for seed in range(4)}) == 4
    assert drawn(runtime_top_k=1, random_seed=1) == round_of(triton, [2, 3], output_len=12)[0]
    assert round_of(triton, [2, 3], output_len=12, session_len=7)[0] == round_of(triton, [2, 3], output_len=5)[0]
    assert "repetition_penalty" in round_of(triton, [2, 3], repetition_penalty=-1.0)[1]


def test_what_cannot_be_honoured_is_refused(triton):
    arrays = {"input_ids": np.array([[2]], dtype=np.uint32), **scalars(input_lengths=1, request_output_len=2)}
    for extra in ("beam_width", "input_embeddings", "is_return_log_probs", "stop_words_list"):
        [(_, error)] = triton.infer("turbomind", **arrays, **{extra: np.zeros((1, 1), dtype=np.uint32)})
        assert f"unexpected inference input ['{extra}']" in error
    [(_, error)] = triton.infer("turbomind", **(arrays | scalars(input_lengths=2)))
    assert "input_lengths is 2" in error
    [(_, error)] = triton.infer("turbomind", **(arrays | {"request_output_len": np.array([[2, 2]], dtype=np.uint32)}))
    assert "request_output_len has 2 values" in error


def test_a_damaged_artifact_is_not_loaded(artifact, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(artifact, folder)
    with (folder / "triton_models/weights/output.weight").open("r+b") as file:
        file.write(b"\1\2\3\4")
    with pytest.raises(ArtifactError, match=r"output\.weight has changed"):
        Model(folder / "model_repository/turbomind")


def test_a_plain_workspace_is_loaded_with_a_loud_line(artifact, tmp_path):
    folder = tmp_path / "plain"
    shutil.copytree(artifact, folder)
    (folder / "manifest.json").unlink()
    write_repository(folder, model_name="tiny", tp=1)
    Logger.lines.clear()
    model = Model(folder / "model_repository/turbomind")
    model.model.finalize()
    assert f"UNVERIFIED FOLDER {folder}" in Logger.lines[0]
    assert "session_len 128" in Logger.lines[1]


def test_the_engine_s_options():
    options = '{"device": "cpu", "max_batch_size": 3, "cache_max_entry_count": "4GB", "quant_policy": 0}'
    assert deployed_config(options) == EngineConfig(max_batch_size=3, cache_max_entry_count="4GB", quant_policy=0)
    for options in ('{"batch": 3}', "[]", "{", ""):
        with pytest.raises(ValueError, match="must be a JSON object of: device"):
            deployed_config(options)
    with pytest.raises(ValueError, match="max_batch_size is '3', but must be a whole number"):
        deployed_config('{"max_batch_size": "3"}')
