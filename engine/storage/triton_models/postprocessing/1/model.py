"""Triton's Python backend for the tokenizer: token ids to text.

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
        rows = pb_utils.get_input_tensor_by_name(request, "TOKENS_BATCH").as_numpy()[0]
        lengths = pb_utils.get_input_tensor_by_name(request, "sequence_length").as_numpy()[0]
        if len(lengths) != len(rows) or any(length > rows.shape[1] for length in lengths):
            message = f"sequence_length {lengths.tolist()} does not fit TOKENS_BATCH of shape {list(rows.shape)}"
            return pb_utils.InferenceResponse(output_tensors=[], error=pb_utils.TritonError(message))
        texts = [
            [self.tokenizer.decode(row[:length].tolist()).encode()] for row, length in zip(rows, lengths, strict=True)
        ]
        output = pb_utils.Tensor("OUTPUT", np.array([texts], dtype=np.object_))
        return pb_utils.InferenceResponse(output_tensors=[output])
