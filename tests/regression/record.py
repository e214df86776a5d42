"""`python -m tests.regression.record`: build the demo's ladder and commit to what it is on this device class.

Run it when a change is meant to change outputs, look at the difference, and say in the commit why it is right.
"""

import json
import tempfile
from pathlib import Path

from pipelines.toolchain import device_class
from tests.regression.ladder import GOLDENS, RUNGS, built_chain, key, measure


def main() -> None:
    with tempfile.TemporaryDirectory() as root:
        chain = built_chain(Path(root))
        goldens = {rung: measure(chain.artifact(key(rung))) for rung in RUNGS}
    # A line for a value of a rung's: a change shows as the lines that it concerns.
    rungs = []
    for rung, golden in goldens.items():
        lines = ",\n".join(f"  {json.dumps(name)}: {_lines(value)}" for name, value in golden.items())
        rungs.append(f"{json.dumps(rung)}: {{\n{lines}\n }}")
    path = GOLDENS / f"{device_class()}.json"
    path.write_text("{\n " + ",\n ".join(rungs) + "\n}\n")
    print(f"{path}: {', '.join(golden['id'][:12] for golden in goldens.values())}")


def _lines(value: object) -> str:
    if isinstance(value, dict):
        return "{\n" + ",\n".join(f"   {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items()) + "\n  }"
    return json.dumps(value)


if __name__ == "__main__":
    main()
