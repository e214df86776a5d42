"""What of Triton Inference Server a test needs, in this process: no Triton server is to be had in the tests.

`Triton` reads a model repository as the server does (every config.pbtxt by Triton's own protobuf schema), runs the
three model.py on a small `triton_python_backend_utils`, and checks what goes in and out against the configurations.
`Service` speaks the gRPC protocol over it.
"""

import contextlib
import importlib.util
import json
import queue
import sys
import threading
from pathlib import Path
from types import ModuleType
from typing import ClassVar

import numpy as np
import pytest

grpc = pytest.importorskip("grpc", reason="tritonclient is not installed: pip install 'tritonclient[grpc]'")
json_format = pytest.importorskip("google.protobuf.json_format")
text_format = pytest.importorskip("google.protobuf.text_format")
model_config_pb2 = pytest.importorskip("tritonclient.grpc.model_config_pb2")
service_pb2 = pytest.importorskip("tritonclient.grpc.service_pb2")
service_pb2_grpc = pytest.importorskip("tritonclient.grpc.service_pb2_grpc")
triton_tensors = pytest.importorskip("tritonclient.utils")

FINAL = 1


class Tensor:
    def __init__(self, name, values):
        self._name, self._values = name, values

    def name(self):
        return self._name

    def as_numpy(self):
        return self._values


class TritonError:
    def __init__(self, message):
        self._message = message

    def message(self):
        return self._message


class InferenceResponse:
    def __init__(self, output_tensors=(), error=None):
        self.outputs, self.error = list(output_tensors), error


class ResponseSender:
    def __init__(self, on_response):
        self._on_response, self._final, self.cancelled = on_response, False, False

    def send(self, response=None, flags=0):
        assert not self._final, "a response after the final one"
        self._final = flags == FINAL
        self._on_response(response, self._final)

    def is_cancelled(self):
        return self.cancelled


class Request:
    def __init__(self, tensors, sender):
        self._tensors, self._sender = tensors, sender

    def get_response_sender(self):
        return self._sender


class Logger:
    lines: ClassVar[list[str]] = []
    log_info = log_warn = lines.append


def backend_utils():
    module = ModuleType("triton_python_backend_utils")
    module.Tensor, module.TritonError, module.InferenceResponse = Tensor, TritonError, InferenceResponse
    module.TRITONSERVER_RESPONSE_COMPLETE_FINAL, module.Logger = FINAL, Logger
    module.get_input_tensor_by_name = lambda request, name: request._tensors.get(name)
    return module


def read_config(path):
    return text_format.Parse(path.read_text(encoding="utf-8"), model_config_pb2.ModelConfig())


class Model:
    """One model of the repository, loaded."""

    def __init__(self, folder: Path):
        self.config = read_config(folder / "config.pbtxt")
        assert self.config.name == folder.name and self.config.backend == "python"
        before = sys.modules.get("triton_python_backend_utils"), sys.dont_write_bytecode
        sys.modules["triton_python_backend_utils"], sys.dont_write_bytecode = backend_utils(), True
        try:
            spec = importlib.util.spec_from_file_location(f"triton_model_{folder.name}", folder / "1/model.py")
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        finally:
            del sys.modules["triton_python_backend_utils"]
            sys.dont_write_bytecode = before[1]
        self.model = module.TritonPythonModel()
        content = json_format.MessageToDict(self.config, preserving_proto_field_name=True)
        self.model.initialize(
            {
                "model_config": json.dumps(content),
                "model_name": folder.name,
                "model_repository": str(folder),
                "model_version": "1",
                "model_instance_kind": "CPU",
            }
        )

    def infer(self, arrays, on_response):
        """Calls `on_response(outputs or None, error or None, final)`, from any thread; returns the request's sender."""
        try:
            tensors = {each.name: self._input(each, arrays.get(each.name)) for each in self.config.input}
            if unknown := set(arrays) - set(tensors):
                raise ValueError(f"unexpected inference input {sorted(unknown)} for model '{self.config.name}'")
        except ValueError as error:
            on_response(None, str(error), True)
            return None

        def answered(response, final):
            if response is None or response.error:
                on_response(None, response and response.error.message(), final)
            else:
                on_response(self._outputs(response), None, final)

        sender = ResponseSender(answered)
        request = Request({name: tensor for name, tensor in tensors.items() if tensor}, sender)
        responses = self.model.execute([request])
        if self.config.model_transaction_policy.decoupled:
            assert responses is None
        else:
            answered(responses[0], True)
        return sender

    def _input(self, declared, values):
        if values is None:
            if not declared.optional:
                raise ValueError(f"expected input '{declared.name}' for model '{self.config.name}'")
            return None
        check(declared, values)
        if declared.HasField("reshape"):
            values = values.reshape(len(values), *declared.reshape.shape)
        return Tensor(declared.name, values)

    def _outputs(self, response):
        declared = {each.name: each for each in self.config.output}
        for tensor in response.outputs:
            check(declared[tensor.name()], tensor.as_numpy())
        assert {tensor.name() for tensor in response.outputs} == set(declared)
        return {tensor.name(): tensor.as_numpy() for tensor in response.outputs}


def datatype(declared):
    name = model_config_pb2.DataType.Name(declared.data_type).removeprefix("TYPE_")
    return "BYTES" if name == "STRING" else name


def check(declared, values):
    """As Triton does: the type, the batch of at most one, and the dimensions."""
    wanted = (1, *declared.dims)
    fits = len(wanted) == values.ndim and all(size in (-1, got) for size, got in zip(wanted, values.shape, strict=True))
    if values.dtype != triton_tensors.triton_to_np_dtype(datatype(declared)) or not fits:
        raise ValueError(f"{declared.name}: {values.dtype} {values.shape}, expected {datatype(declared)} {wanted}")


class Triton:
    """All models of a repository; `with` unloads them."""

    def __init__(self, repository: Path):
        self.models = {folder.name: Model(folder) for folder in sorted(repository.iterdir())}

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for model in self.models.values():
            if hasattr(model.model, "finalize"):
                model.model.finalize()

    def infer(self, name, **arrays):
        """The responses of one request, as (outputs, error) pairs, as they come."""
        arrived = queue.Queue()
        self.models[name].infer(arrays, lambda *response: arrived.put(response))
        final = False
        while not final:
            outputs, error, final = arrived.get(timeout=60)
            yield outputs, error


class Service(service_pb2_grpc.GRPCInferenceServiceServicer):
    """The part of the protocol that the client uses."""

    def __init__(self, triton):
        self.triton = triton

    def ServerReady(self, request, context):
        return service_pb2.ServerReadyResponse(ready=True)

    def ModelReady(self, request, context):
        return service_pb2.ModelReadyResponse(ready=request.name in self.triton.models)

    def ModelInfer(self, request, context):
        model = self.triton.models[request.model_name]
        if model.config.model_transaction_policy.decoupled:
            context.abort(grpc.StatusCode.UNIMPLEMENTED, "ModelInfer RPC doesn't support decoupled models")
        [(outputs, error)] = self.triton.infer(request.model_name, **arrays_of(request))
        if error:
            context.abort(grpc.StatusCode.INTERNAL, error)
        return response_of(request, outputs)

    def ModelStreamInfer(self, requests, context):
        arrived = queue.Queue()
        context.add_callback(lambda: arrived.put(None))

        def answer(request):
            def on_response(outputs, error, final):
                message = service_pb2.ModelStreamInferResponse(error_message=error or "")
                message.infer_response.CopyFrom(response_of(request, outputs or {}))
                message.infer_response.parameters["triton_final_response"].bool_param = final
                arrived.put(message)

            self.triton.models[request.model_name].infer(arrays_of(request), on_response)

        def read():
            with contextlib.suppress(grpc.RpcError):  # the client cancelled
                for request in requests:
                    answer(request)
            arrived.put(None)

        threading.Thread(target=read, daemon=True).start()
        while (message := arrived.get()) is not None:
            yield message


def arrays_of(request):
    arrays = {}
    for tensor, raw in zip(request.inputs, request.raw_input_contents, strict=True):
        if tensor.datatype == "BYTES":
            values = triton_tensors.deserialize_bytes_tensor(raw)
        else:
            values = np.frombuffer(raw, dtype=triton_tensors.triton_to_np_dtype(tensor.datatype))
        arrays[tensor.name] = values.reshape(tensor.shape)
    return arrays


def response_of(request, outputs):
    response = service_pb2.ModelInferResponse(model_name=request.model_name, id=request.id)
    for name, values in outputs.items():
        text = values.dtype == np.object_
        kind = "BYTES" if text else {"uint32": "UINT32"}[values.dtype.name]
        response.outputs.add(name=name, datatype=kind, shape=values.shape)
        raw = triton_tensors.serialize_byte_tensor(values).item() if text else values.tobytes()
        response.raw_output_contents.append(raw)
    return response
