"""`ingot artifacts ...`: what is in the store, what is known about it, and moving it to and from a remote folder."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cli.arguments import Parser
from cli.checkout import open_store, project_cache
from engine.storage.artifacts import SHORT, Manifest, read_manifest, verify
from engine.storage.hf_config import FORMS, check_form
from engine.storage.store import Store
from engine.storage.triton_repository import link_repository


def main(argv: list[str]) -> int:
    parser = Parser(prog="ingot artifacts", description=__doc__, allow_abbrev=False)
    parser.add_argument("--store", metavar="PATH", help="another store than this checkout's")
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    add(verbs, "list", show_list, "ids, names, recipes and verdicts")
    add(verbs, "show", show, "the manifest and the evaluations of one artifact", "artifact")
    add(verbs, "path", show_path, "the folder of one artifact", "artifact")
    add(verbs, "verify", verify_one, "read every byte again", "artifact")
    add(verbs, "pin", pin, "let a name stand for an artifact", "name", "artifact")
    add(verbs, "export", export, "copy one artifact to a folder that does not exist yet", "artifact", "folder")
    verbs.choices["export"].add_argument("--format", choices=FORMS, help="as a Hugging Face checkpoint in that form")
    add(verbs, "push", push, "put an artifact, its pins and its evaluations into a remote folder", "remote", "artifact")
    add(verbs, "pull", pull, "take an artifact, by id or name, from a remote folder", "remote", "artifact")
    add(verbs, "reshard", reshard, "the same weights for another number of ranks: tp=N or --tp N", "artifact")
    verbs.choices["reshard"].add_argument("tp", nargs="?", metavar="tp=N", help="ranks, a power of two")
    verbs.choices["reshard"].add_argument("--tp", dest="ranks", metavar="N", help="the same as tp=N")
    options = parser.parse_args(argv)
    options.run(open_store(options.store), options)
    return 0


def add(verbs: Any, name: str, run: Callable[[Store, argparse.Namespace], None], text: str, *arguments: str) -> None:
    parser = verbs.add_parser(name, help=text, description=text, allow_abbrev=False)
    for argument in arguments:
        parser.add_argument(argument, help="an id, a unique prefix or a name" if argument == "artifact" else None)
    parser.set_defaults(run=run)


def show_list(store: Store, options: argparse.Namespace) -> None:
    names: dict[str, list[str]] = {}
    for name, artifact_id in store.names().items():
        names.setdefault(artifact_id, []).append(name)
    rows = [("ID", "RECIPE", "TP", "SIZE", "VERDICT", "NAMES")]
    for artifact_id in store.ids():
        manifest = stored_manifest(store, artifact_id)
        size = "" if manifest is None else f"{manifest.size / 2**20:.1f} MiB"
        recipe, tp = ("(not here)", "") if manifest is None else (str(manifest.recipe), str(manifest.tp))
        called = ", ".join(names.get(artifact_id, []))
        rows.append((artifact_id[:SHORT], recipe, tp, size, verdict(store, artifact_id), called))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def stored_manifest(store: Store, artifact_id: str) -> Manifest | None:
    """None for an artifact whose folder is gone: it can be restored, which a list does not do."""
    folder = store.root / artifact_id
    return read_manifest(folder) if folder.is_dir() else None


def verdict(store: Store, artifact_id: str) -> str:
    """That of the newest evaluation, which decides about serving."""
    statements = store.evaluations(artifact_id)
    return str(statements[-1]["predicate"].get("verdict")) if statements else "not evaluated"


def show(store: Store, options: argparse.Namespace) -> None:
    artifact_id = store.resolve(options.artifact)
    folder = store.path(artifact_id)
    manifest = read_manifest(folder)
    called = [name for name, known in store.names().items() if known == artifact_id]
    print(f"id           {artifact_id}")
    print(f"names        {', '.join(called) or 'none'}")
    print(f"recipe       {manifest.recipe}")
    print(f"tp           {manifest.tp}")
    calibration = [f"{digest[:SHORT]} ({what})" for what, digest in (manifest.calibration or {}).items()]
    print(f"calibration  {', '.join(calibration) or 'none'}")
    print(f"files        {len(manifest.files)}, {manifest.size / 2**20:.1f} MiB, in {folder}")
    for name, digest in sorted(manifest.sources.items()):
        print(f"source       {digest[:SHORT]}  {name}")
    for statement in store.evaluations(artifact_id):
        print("evaluation")
        print(json.dumps(statement["predicate"], indent=2, ensure_ascii=False))


def show_path(store: Store, options: argparse.Namespace) -> None:
    print(store.path(store.resolve(options.artifact)))


def verify_one(store: Store, options: argparse.Namespace) -> None:
    artifact_id = store.resolve(options.artifact)
    manifest = verify(store.path(artifact_id), artifact_id)
    print(f"{artifact_id}: {len(manifest.files)} files, {manifest.size} bytes, all as they were written")


def pin(store: Store, options: argparse.Namespace) -> None:
    store.pin(options.name, options.artifact)
    print(f"{options.name} -> {store.names()[options.name]}")


def export(store: Store, options: argparse.Namespace) -> None:
    """A copy, not links to the store: what is done to it later must not reach it. Triton's folders become links."""
    artifact_id = store.resolve(options.artifact)
    folder = Path(options.folder)
    if folder.exists():
        raise ValueError(f"{folder} exists already: name a folder that does not.")
    source = store.path(artifact_id)
    if options.format:
        export_as(source, artifact_id, folder, options.format)
        return
    temporary = folder.with_name(f"{folder.name}.tmp-{artifact_id[:SHORT]}")
    try:
        shutil.copytree(source, temporary)
        verify(temporary, artifact_id)
        link_repository(temporary)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(folder)


def export_as(source: Path, artifact_id: str, folder: Path, form: str) -> None:
    manifest = verify(source, artifact_id)
    check_form(form, manifest.recipe, artifact_id[:SHORT])
    # Torch takes seconds to import; what is wrong with the arguments is said before.
    from engine.storage.hf_export import export_checkpoint
    from engine.storage.workspace import Workspace

    export_checkpoint(Workspace(source), folder, form=form)
    print(folder)


def push(store: Store, options: argparse.Namespace) -> None:
    print(store.push(options.remote, options.artifact))


def pull(store: Store, options: argparse.Namespace) -> None:
    store.init(project_cache())
    print(store.pull(options.remote, options.artifact))


def reshard(store: Store, options: argparse.Namespace) -> None:
    """Nothing is quantized again, so the weights are bit-equal; but what was measured was the other artifact."""
    asked = [text for text in (options.tp and options.tp.removeprefix("tp="), options.ranks) if text]
    if len(asked) != 1 or not asked[0].isdecimal():
        raise ValueError("say for how many ranks, once: `ingot artifacts reshard ID tp=2`, or --tp 2.")
    artifact_id, tp = store.resolve(options.artifact), int(asked[0])
    folder = store.path(artifact_id)
    if verify(folder, artifact_id).tp == tp:
        print(f"{artifact_id[:SHORT]} is an artifact of tp={tp} already", file=sys.stderr)
        print(artifact_id)
        return
    # Torch takes seconds to import; what is wrong with the arguments is said before.
    from engine.storage.reshard import reshard_artifact

    # Named as the store's own temporary folders are: it sweeps what a killed process leaves.
    with tempfile.TemporaryDirectory(prefix=".put-reshard-", dir=store.root) as temporary:
        reshard_artifact(folder, Path(temporary) / "artifact", tp)
        resharded = store.put(Path(temporary) / "artifact")
    print(
        f"tp={tp}: the same model, recipe and sources as {artifact_id[:SHORT]}, bit-equal weights; it has no "
        'evaluation yet, so serving it asks for waiver="..."',
        file=sys.stderr,
    )
    print(resharded)
