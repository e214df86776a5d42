"""Triton's Python backend for the engine. Ingot must be installed for the Python that Triton runs.

A request is one round of a session; `engine.runtime.sessions` says what its inputs mean. Every response holds all
tokens of the session so far, and their number.
"""

import json
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils

from engine.runtime.deployment import open_deployed
from engine.runtime.sessions import SessionRequest, SessionThread, turbomind_sampling


class TritonPythonModel:
    def initialize(self, args):
        """Check every byte that the engine reads against the manifest, and start the engine in a thread."""
        config = json.loads(args["model_config"])
        parameters = {name: entry["string_value"] for name, entry in config["parameters"].items()}
        workspace = (Path(args["model_repository"]) / parameters["workspace_path"]).resolve()
        engine, artifact_id = open_deployed(
            workspace,
            parameters["engine"],
            model_name=parameters["model_name"],
            tp=int(parameters["tensor_para_size"]),
        )
        if artifact_id is None:
            pb_utils.Logger.log_warn(f"UNVERIFIED FOLDER {workspace}: its bytes and its quality were not checked")
        pb_utils.Logger.log_info(f"artifact {artifact_id} in {workspace}, session_len {engine.session_len}")
        self.sessions = SessionThread(engine)

    def execute(self, requests):
        """Hand the requests to the engine's thread, which answers them through their senders."""
        for request in requests:
            reply = Reply(request.get_response_sender())
            try:
                asked = read(request)
            except ValueError as error:
                reply(None, final=True, error=str(error))
            else:
                self.sessions.submit(asked, reply)

    def finalize(self):
        self.sessions.close()


class Reply:
    """Sends what is new of one request; False when its client has gone."""

    def __init__(self, sender):
        self.sender = sender

    def __call__(self, token_ids, *, final, error=None):
        if error is not None:
            response = pb_utils.InferenceResponse(output_tensors=[], error=pb_utils.TritonError(error))
        else:
            # A copy: the array goes on growing.
            ids = np.array(token_ids, dtype=np.uint32).reshape(1, 1, -1)
            length = np.array([[ids.size]], dtype=np.uint32)
            tensors = [pb_utils.Tensor("output_ids", ids), pb_utils.Tensor("sequence_length", length)]
            response = pb_utils.InferenceResponse(output_tensors=tensors)
        self.sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if final else 0)
        return not self.sender.is_cancelled()


def read(request):
    input_ids = pb_utils.get_input_tensor_by_name(request, "input_ids").as_numpy().ravel()
    input_length = scalar(request, "input_lengths")
    if input_length > input_ids.size:
        raise ValueError(f"input_lengths is {input_length}, but input_ids has {input_ids.size} tokens.")
    return SessionRequest(
        session_id=scalar(request, "CORRID"),
        start=bool(scalar(request, "START", 0)),
        end=bool(scalar(request, "END", 0)),
        stop=bool(scalar(request, "STOP", 0)),
        input_ids=input_ids[:input_length].tolist(),
        step=scalar(request, "step", -1),
        session_len=scalar(request, "session_len", 0),
        sampling=turbomind_sampling(
            request_output_len=scalar(request, "request_output_len"),
            runtime_top_k=scalar(request, "runtime_top_k", 0),
            runtime_top_p=scalar(request, "runtime_top_p", 0.0),
            temperature=scalar(request, "temperature", 1.0),
            repetition_penalty=scalar(request, "repetition_penalty", 1.0),
            random_seed=scalar(request, "random_seed"),
        ),
    )


def scalar(request, name, default=None):
    """The one value of an input as Python's own type; `default` where the request does not have it."""
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    if tensor is None:
        return default
    values = tensor.as_numpy().ravel()
    if values.size != 1:
        raise ValueError(f"{name} has {values.size} values, but must have 1.")
    return values[0].item()
