"""`ingot gate [KEY...]`: what of the build does not hold its gates. Exit code 1 unless all of it passes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from pipelines.outcomes import SHORT, number, print_table, read_outcome, selected_keys
from pipelines.worktree import project_root


def main(argv: Sequence[str] | None = None) -> int:
    """Print the misses of the artifacts named by key (all that are selected if none is), and say whether there are any.

    An inconclusive gate is a miss: what is served has to pass.
    """
    parser = argparse.ArgumentParser(prog="ingot gate", description=__doc__)
    parser.add_argument("keys", nargs="*", metavar="KEY", help="as `dvc repro publish@KEY` names it; all if none")
    arguments = parser.parse_args(argv)
    try:
        root = project_root()
        known = selected_keys(root)
        unknown = sorted(set(arguments.keys) - set(known))
        if unknown:
            raise ValueError(f"{', '.join(unknown)} is not selected by params.yaml, which selects {', '.join(known)}.")
        outcomes = [read_outcome(root, key) for key in arguments.keys or known]
    except (ValueError, OSError) as error:
        print(f"ingot gate: {error}", file=sys.stderr)
        return 1
    failed = [outcome for outcome in outcomes if outcome.verdict != "pass"]
    if not failed:
        print(f"{len(outcomes)} of {len(outcomes)} artifacts pass their gates")
        return 0
    rows = [
        [o.key, o.id[:SHORT], gate["metric"], number(gate["value"]), gate["verdict"], gate["why"]]
        for o in failed
        for gate in o.misses or [{"metric": "-", "value": None, "verdict": o.verdict, "why": "the set has no gates"}]
    ]
    print_table(
        f"{len(failed)} of {len(outcomes)} artifacts do not pass",
        ["artifact", "id", "metric", "value", "verdict", "why"],
        rows,
    )
    return 1


if __name__ == "__main__":
    raise SystemExit(main())
