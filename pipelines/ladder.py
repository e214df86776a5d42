"""`ingot ladder MODEL [--pin NAME]`: climb from fp16 to w4a16-kv8, through w8a8, and choose the last that passes.

The rule, from the practice of the tools that this one follows: try the rungs in order and go on while they pass; on a
failure go back one step, to what passed before. fp16 has to pass, else there is nothing to quantize. A failed step is
not taken again in a later rung (kv8 that fails on fp16 is not tried on w4a16, and w4a16-kv8 needs w4a16), but it does
not stop the other kind of step: after a failed fp16-kv8, w4a16 is still tried. Inconclusive is not a pass.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.config import Recipe
from engine.storage.store import Store
from pipelines.outcomes import SHORT, Outcome, number, print_table, read_outcome
from pipelines.selection import read_selection
from pipelines.slices import PATHS, read_slice
from pipelines.units import human_size
from pipelines.worktree import project_root, run_dvc

RUNGS = (
    Recipe(weights="fp16", kv="kv16"),
    Recipe(weights="fp16", kv="kv8"),
    Recipe(weights="w8a8", kv="kv16"),
    Recipe(weights="w8a8", kv="kv8"),
    Recipe(weights="w4a16", kv="kv16"),
    Recipe(weights="w4a16", kv="kv8"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One rung of a climb: what was measured (None where it was not tried), and what was decided, in words."""

    recipe: Recipe
    outcome: Outcome | None
    why: str


def climb(measure: Callable[[Recipe], Outcome]) -> tuple[Recipe | None, list[Step]]:
    """Climb, building each rung only when its turn comes; the chosen recipe (None when fp16 fails), and all steps."""
    chosen: Recipe | None = None
    missed: list[Recipe] = []
    steps: list[Step] = []
    for recipe in RUNGS:
        obstacle = next((rung for rung in missed if _contains(recipe, rung)), None)
        if obstacle is not None:
            steps.append(Step(recipe=recipe, outcome=None, why=f"not tried: {obstacle} does not pass"))
            continue
        outcome = measure(recipe)
        if outcome.verdict == "pass":
            chosen = recipe
            steps.append(Step(recipe=recipe, outcome=outcome, why="passes: go on"))
        else:
            missed.append(recipe)
            back = f"back to {chosen}" if chosen else "use a larger or a fine-tuned model"
            steps.append(Step(recipe=recipe, outcome=outcome, why=f"{back}: {_reason(outcome)}"))
    return chosen, [_marked(step) if step.recipe == chosen else step for step in steps]


def main(argv: Sequence[str] | None = None) -> int:
    """Climb for one model of params.yaml, print the table, and pin the name to the chosen artifact."""
    parser = argparse.ArgumentParser(prog="ingot ladder", description=__doc__, allow_abbrev=False)
    parser.add_argument("model", metavar="MODEL", help="a model of params.yaml")
    parser.add_argument("--calibration", metavar="NAME", help="a calibration of params.yaml; the first if not given")
    parser.add_argument("--tp", type=int, help="a tp of params.yaml; the first if not given")
    parser.add_argument("--pin", metavar="NAME", help="give the chosen artifact this name in the store")
    arguments = parser.parse_args(argv)
    try:
        root = project_root()
        prefix, tp = _place(root, arguments.model, arguments.calibration, arguments.tp)
        chosen, steps = climb(lambda recipe: _build(root, f"{prefix}-{recipe.weights}-{tp}-{recipe.kv}"))
        _show(arguments.model, steps)
        if chosen is None:
            raise ValueError(f"fp16 of {arguments.model} does not pass: there is nothing to choose.")
        artifact = next(step.outcome.id for step in steps if step.recipe == chosen and step.outcome)
        if arguments.pin:
            Store(Path(read_slice(root / PATHS)["store"])).pin(arguments.pin, artifact)
        print(f"chosen: {chosen}  {artifact}" + (f"  pinned as {arguments.pin}" if arguments.pin else ""))
    except (ValueError, OSError) as error:
        print(f"ingot ladder: {error}", file=sys.stderr)
        return 1
    return 0


def _place(root: Path, model: str, calibration: str | None, tp: int | None) -> tuple[str, int]:
    selection = read_selection(root / "params.yaml")
    calibration, tp = calibration or selection.calibrations[0], tp or selection.tps[0]
    asked: list[tuple[str, object, Sequence[object]]] = [
        ("models", model, selection.models),
        ("calibrations", calibration, selection.calibrations),
        ("tps", tp, selection.tps),
        *(("weights", recipe.weights, selection.weights) for recipe in RUNGS),
        *(("kvs", recipe.kv, selection.kvs) for recipe in RUNGS),
    ]
    for key, value, listed in asked:
        if value not in listed:
            raise ValueError(f"{value} is not among the {key} of params.yaml, {listed}. Add it there.")
    return f"{model}-{calibration}", tp


def _build(root: Path, key: str) -> Outcome:
    if run_dvc(root, ["repro", "--quiet", f"publish@{key}"]):
        raise ValueError(f"{key} could not be built; what stopped it is said above.")
    return read_outcome(root, key)


def _contains(rung: Recipe, step: Recipe) -> bool:
    """Whether `rung` takes the step that `step` took beyond fp16."""
    if step.weights != "fp16":
        return rung.weights == step.weights
    return step.kv == "kv16" or rung.kv == step.kv


def _reason(outcome: Outcome) -> str:
    return "; ".join(f"{gate['metric']} {number(gate['value'])}, {gate['why']}" for gate in outcome.misses)


def _marked(step: Step) -> Step:
    return Step(recipe=step.recipe, outcome=step.outcome, why="chosen: the last rung that passes")


def _show(model: str, steps: Sequence[Step]) -> None:
    rows = []
    for step in steps:
        o = step.outcome
        measured = ["-"] * 7 if o is None else _measured(o)
        rows.append([str(step.recipe), *measured, step.why])
    columns = ["recipe", "size", "kv/token", "perplexity", "KL", "agreement", "verdict", "id", "why"]
    print_table(f"ladder of {model}", columns, rows)


def _measured(outcome: Outcome) -> list[str]:
    figures = [number(outcome.metric(name)) for name in ("perplexity", "kl_mean", "top1_agreement")]
    sizes = [human_size(outcome.sizes[name]) for name in ("artifact_bytes", "kv_bytes_per_token")]
    return [*sizes, *figures, outcome.verdict, outcome.id[:SHORT]]


if __name__ == "__main__":
    raise SystemExit(main())
