"""The process that `ingot bench cold` starts: it loads a workspace as the server does, draws one token, and says when.

Prints one JSON object: seconds of the clock that all processes of a machine share, at the end of each phase.
"""

from __future__ import annotations

import json
import sys
import time

PROMPT_TOKENS = 16


def main() -> int:
    ended = {"started": time.monotonic()}
    job = json.loads(sys.argv[1])
    import torch

    ended["imported"] = time.monotonic()
    from engine.config import Sampling
    from engine.runtime.process import load

    engine, _ = load(job)
    if job["config"]["device"].startswith("cuda"):
        torch.cuda.synchronize()
    ended["loaded"] = time.monotonic()
    engine.add(list(range(3, 3 + PROMPT_TOKENS)), Sampling(max_new_tokens=1, temperature=0.0, ignore_eos=True))
    while not any(event.token_ids for event in engine.step()):
        pass
    ended["answered"] = time.monotonic()
    print(json.dumps(ended))
    return 0


if __name__ == "__main__":
    sys.exit(main())
