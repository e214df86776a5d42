"""Triton's Python backend for the tokenizer: text, or the messages of a chat, to token ids.

Ingot must be installed for the Python that Triton runs.
"""

import json
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils

from engine.runtime.tokenizer import Tokenizer


class TritonPythonModel:
    def initialize(self, args):
        parameters = json.loads(args["model_config"])["parameters"]
        folder = Path(args["model_repository"]) / parameters["tokenizer_path"]["string_value"]
        self.tokenizer = Tokenizer(folder.resolve())

    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        query = pb_utils.get_input_tensor_by_name(request, "QUERY").as_numpy().ravel()
        chat = pb_utils.get_input_tensor_by_name(request, "CHAT")
        try:
            if query.size != 1:
                raise ValueError(f"QUERY has {query.size} texts, but must have 1.")
            text = query[0].decode()
            ids = self.encode_chat(text) if chat is not None and chat.as_numpy().any() else self.tokenizer.encode(text)
        except ValueError as error:
            return pb_utils.InferenceResponse(output_tensors=[], error=pb_utils.TritonError(str(error)))
        input_id = np.array([ids], dtype=np.uint32)
        length = np.array([[len(ids)]], dtype=np.uint32)
        tensors = [pb_utils.Tensor("INPUT_ID", input_id), pb_utils.Tensor("REQUEST_INPUT_LEN", length)]
        return pb_utils.InferenceResponse(output_tensors=tensors)

    def encode_chat(self, text):
        messages = json.loads(text)
        if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
            raise ValueError('with CHAT 1, QUERY must be a JSON list of messages: [{"role": "user", "content": "..."}]')
        return self.tokenizer.encode_chat(messages)
