"""A `python` that has imported the heavy libraries already, for tests that run many stages.

`serve` waits on a socket with torch and dvc loaded and forks for every request; the program that it is reached by is
found first on PATH as `python`, and hands `-m pipelines.X ...` and `-m dvc ...` over with folder, environment and
streams. Code of the project is never imported before the fork: every stage reads it anew, as in a process of its own.
"""

import contextlib
import json
import os
import runpy
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

PROGRAM = """#!{python} -SsE
import json, os, socket, sys
if sys.argv[1:2] != ["-m"] or not (sys.argv[2].startswith("pipelines.") or sys.argv[2] == "dvc"):
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
with socket.socket(socket.AF_UNIX) as connection:
    connection.connect({address!r})
    request = json.dumps({{"argv": sys.argv[2:], "folder": os.getcwd(), "environment": dict(os.environ)}}).encode()
    socket.send_fds(connection, [len(request).to_bytes(8, "big")], [0, 1, 2])
    connection.sendall(request)
    answer = connection.recv(1)
sys.exit(answer[0] if answer else 99)
"""


@contextlib.contextmanager
def warm_python(folder):
    """The folder to put first on PATH, while the waiting process lives."""
    address, programs = folder / "socket", folder / "bin"
    programs.mkdir(parents=True)
    (programs / "python").write_text(PROGRAM.format(python=sys.executable, address=str(address)))
    (programs / "python").chmod(0o755)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, __file__, str(address)], env=environment)
    try:
        until = time.monotonic() + 120
        while not address.exists():
            assert process.poll() is None and time.monotonic() < until, "the waiting process did not come up"
            time.sleep(0.05)
        yield programs
    finally:
        process.kill()
        process.wait()


def serve(address):
    """Load the libraries, then fork for every request."""
    import hydra  # noqa: F401
    import safetensors.torch  # noqa: F401
    import tokenizers  # noqa: F401
    import torch  # noqa: F401
    import tqdm  # noqa: F401

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{address}.new")
        listener.listen(8)
        Path(f"{address}.new").rename(address)
        while True:
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                _answer(connection)
            connection.close()
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG) != (0, 0):
                    pass


def _answer(connection):
    code = 98
    try:
        length, streams, _, _ = socket.recv_fds(connection, 8, 3)
        body = b""
        while len(body) < int.from_bytes(length, "big"):
            body += connection.recv(1 << 16)
        request = json.loads(body)
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        os.chdir(request["folder"])
        os.environ.clear()
        os.environ.update(request["environment"])
        sys.argv = request["argv"]
        added = request["environment"].get("PYTHONPATH", "").split(os.pathsep)
        sys.path[:0] = [request["folder"], *filter(None, added)]
        try:
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except Exception:
            traceback.print_exc()
            code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        connection.sendall(bytes([code]))
        os._exit(code)


if __name__ == "__main__":
    serve(sys.argv[1])
