"""`ingot build --check ID`: build an artifact again from how it was built, and compare it with what the store has.

    ingot build --check 3f9c1b2a [--store PATH]

It is built in a copy of the work tree by the stages alone: no DVC, so neither its cache nor its run cache, and nothing
of an unfinished run. Prints `equal ID`, or the first tensor that differs, and exits 1. Where the device class or the
versions of the libraries are not those that it was built with, bits may differ: then tensors are compared by their
error, and that is said.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from engine.storage.artifacts import SHORT, read_manifest, verify
from engine.storage.store import Store
from pipelines import slices
from pipelines.provenance import FORMAT, STAGES, provenance, stage_keys
from pipelines.slices import PATHS, write_json
from pipelines.sources import sha256_file
from pipelines.toolchain import toolchain
from pipelines.worktree import JOBS, copy_tree, project_root

INPUTS = {"calibrate": (), "quantize": ("calibrate",), "shard": ("quantize",)}
INPUTS["export"] = ("shard", "quantize", "calibrate")


def main(argv: Sequence[str]) -> int:
    """Run the command line; 0 when the artifact came out the same, or near enough where bits are not promised."""
    parser = argparse.ArgumentParser(prog="ingot build", description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--check", metavar="ID", required=True, help="an id, a unique prefix of one, or a name")
    parser.add_argument("--store", metavar="PATH", help="another store than this project's")
    arguments = parser.parse_args(argv)
    try:
        root = project_root()
        store = Store(Path(arguments.store).expanduser() if arguments.store else root / _configured_store(root))
        said, same = check(root, store, store.resolve(arguments.check))
    except (ValueError, OSError) as error:
        print(f"ingot build: {error}", file=sys.stderr)
        return 1
    print(said)
    return 0 if same else 1


def check(root: Path, store: Store, artifact_id: str) -> tuple[str, bool]:
    """Build an artifact of the store again; what there is to say, and whether it is the same."""
    built = how_it_was_built(root, store, artifact_id)
    here = toolchain()
    before = {name: value for name, value in built["toolchain"].items() if here.get(name) != value}
    kept = store.path(artifact_id)
    verify(kept, artifact_id)
    (root / JOBS).mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f"job-{os.getpid()}-", dir=root / JOBS))
    try:
        copy_tree(root, folder)
        again = rebuild(folder, built, {**store.places(), **_places(root)}, toolchain=here)
        if read_manifest(again).id == artifact_id:
            return f"equal {artifact_id}", True
        return _compare(kept, again, artifact_id, before, changed_code(root, built["code"]))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def how_it_was_built(root: Path, store: Store, artifact_id: str) -> dict[str, Any]:
    """An artifact's provenance: the store's record or, without one, what this project says that it has published.

    ValueError where neither is known.
    """
    known = store.provenance(artifact_id)
    if known is not None:
        if known.get("format") != FORMAT or set(known.get("slices", {})) != set(STAGES):
            raise ValueError(
                f"The store's record of how {artifact_id[:SHORT]} was built is of a form that is not known."
            )
        return known
    for path in sorted((root / "build/publish").glob("*.json")):
        if slices.read_slice(path).get("id") == artifact_id:
            return provenance(root / "build/slices", path.stem)
    raise ValueError(
        f"How {artifact_id[:SHORT]} was built is not recorded, and it is none of those that this project has published:"
        " it was put into the store by other means (`ingot artifacts reshard`, an older version, a pull from a remote"
        " of one). Check the artifact that it was made of, or build it here with `ingot build`, which records it."
    )


def rebuild(
    folder: Path, built: Mapping[str, Any], places: Mapping[str, str], *, toolchain: Mapping[str, str | None]
) -> Path:
    """Run the stages of an artifact in `folder`, a copy of the project; the folder of what `export` made.

    Slices are taken as they are, for the toolchain that is here. ValueError where a stage does not come to its end.
    """
    write_json(folder / PATHS, dict(places))
    outs: dict[str, Path] = {}
    calibrated = built["slices"]["export"]["calibration"] is not None
    for stage, key in stage_keys(built["key"]).items():
        outs[stage] = Path("build") / stage / key
        if stage == "calibrate" and not calibrated:
            continue  # nothing of it is in the artifact
        content = dict(built["slices"][stage])
        if "toolchain" in content:
            content["toolchain"] = dict(toolchain)
        slice_path = Path("build/slices") / stage / f"{key}.json"
        write_json(folder / slice_path, content)
        command = [sys.executable, "-m", f"pipelines.{stage}", "--slice", str(slice_path), "--out", str(outs[stage])]
        command += [word for name in INPUTS[stage] for word in ("--in", f"{name}={outs[name]}")]
        environment = {**os.environ, "PYTHONPATH": str(folder)}
        done = subprocess.run(
            command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=sys.stderr.fileno(), check=False
        )
        if done.returncode:
            raise ValueError(
                f"{built['key']} could not be built again: {stage} stopped with {done.returncode}, for the"
                " reason above."
            )
    return folder / outs["export"]


def changed_code(root: Path, code: Mapping[str, str]) -> list[str]:
    """The files of code that are not what the artifact was built with."""
    now: dict[str, str] = {}
    for path in code:
        if (root / path).is_file():
            now[path] = sha256_file(root / path)
    return sorted(path for path, digest in code.items() if now.get(path) != digest)


def _compare(
    kept: Path, again: Path, artifact_id: str, before: Mapping[str, str | None], code: Sequence[str]
) -> tuple[str, bool]:
    """What there is to say of two artifacts that are not equal, and whether that is near enough."""
    # Torch takes seconds to import, and an artifact that is equal does not need it.
    from engine.storage.workspace import CONFIG_INI, WEIGHTS
    from pipelines.difference import changed_files, model_differences, tensor_differences

    manifests = read_manifest(kept), read_manifest(again)
    files = changed_files(*manifests)
    said = f"{len(files)} of {len(manifests[0].files)} files differ"
    if not files:
        said = "the files are equal, but not what the manifest says of the recipe or the sources"
    found = list((model_differences if before else tensor_differences)(kept, again)) if files else []
    others = [path for path in files if not path.startswith(f"{WEIGHTS}/") or path.endswith(CONFIG_INI)]
    near = bool(before) and bool(files) and not others and all(one.is_near for one in found)
    if found:
        shown = max(found, key=lambda one: one.relative_error / one.tolerance) if before else found[0]
        said += (
            f"; the {'tensor that differs most' if before else 'first tensor that differs'} is {shown.tensor}"
            f" ({shown.file}): {shown.max_error:.3g} in its worst value, {shown.relative_error:.1e} of its norm"
        )
    elif files:
        said += ", no tensor does"
    if others:
        said += f"; {others[0]} differs, which is no weight"
    if before:
        here = toolchain()
        changes = ", ".join(f"{name} {here[name]} instead of {value}" for name, value in before.items())
        said += (
            f". It was built elsewhere (here: {changes}): errors count and not bits"
            f"{f', up to {shown.tolerance} of the norm of such a tensor' if found else ''}"
        )
    if code:
        said += f". Code has changed since it was built: {', '.join(code[:5])}{', ...' if len(code) > 5 else ''}"
    return f"{'near' if near else 'different'} {artifact_id}: {said}.", near


def _configured_store(root: Path) -> str:
    return str(yaml.safe_load((root / "conf/config.yaml").read_text(encoding="utf-8")).get("store", "store"))


def _places(root: Path) -> dict[str, str]:
    """Where this project has found its sources; nothing where nothing was built in it."""
    if not (root / PATHS).is_file():
        return {}
    return {key: place for key, place in slices.read_slice(root / PATHS).items() if key not in ("store", "cache")}
