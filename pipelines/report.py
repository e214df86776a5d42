"""`ingot report [KEY...]`: what there is to see of what was built, as a page of figures for each artifact.

    ingot report demo-demo_text-w4a16-1-kv8      # build/reports/<key>/index.html
    ingot report                                 # of every artifact that is selected and built

Per layer: the error of outputs before and after scaling, outliers of inputs, errors of weights, steps that K and V use;
linears that stayed floats; what it took; what it is made of. The page is read from what the stages left and is nobody's
input, so figures of time may be on it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pipelines.outcomes import selected_keys
from pipelines.slices import read_slice
from pipelines.worktree import project_root

REPORTS = Path("build/reports")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 1 when an artifact that was named is not built."""
    parser = argparse.ArgumentParser(
        prog="ingot report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("keys", nargs="*", metavar="KEY", help="model-calibration-weights-tp-kv; all without one")
    arguments = parser.parse_args(argv)
    try:
        root = project_root()
        known = selected_keys(root)
        keys = arguments.keys or [key for key in known if (root / "build/export" / key).is_dir()]
        for key in keys:
            if key not in known:
                raise ValueError(f"{key} is not built here: there are {', '.join(known)}.")
            print(write(root, key))
        if not keys:
            raise ValueError("nothing is built yet: `dvc repro` builds.")
    except (ValueError, OSError) as error:
        print(f"ingot report: {error}", file=sys.stderr)
        return 1
    return 0


def write(root: Path, key: str) -> Path:
    """Write the page of one artifact and return its path. FileNotFoundError where the artifact is not built."""
    # Torch takes seconds to import; what is wrong with the arguments is said before.
    from pipelines.diagnostics.findings import collect
    from pipelines.diagnostics.page import page

    findings = collect(root, key)
    published = root / f"build/publish/{key}.json"
    verdict = read_slice(published).get("verdict") if published.is_file() else None
    target = root / REPORTS / key / "index.html"
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_suffix(".tmp")
    temporary.write_text(page(findings, findings.manifest.id, verdict), encoding="utf-8")
    temporary.replace(target)
    return target


if __name__ == "__main__":
    raise SystemExit(main())
