"""What is known about artifacts beside their bytes: pins, names and evaluations. A store and a remote keep them alike.

<id>.dvc                                     where DVC finds the bytes
names.json                                   name -> id
evaluations/<id>/<device class>-<evaluation>.json   an in-toto statement; `….goldens.json` beside it
provenance/<id>.json                         how it was built
places.json                                  source -> where it lay when something was built of it; of this machine
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engine.storage.artifacts import SHORT, ArtifactError, canonical_json
from engine.storage.json_file import read_object

Statement = dict[str, Any]

ID = re.compile(r"[0-9a-f]{64}")
_PREFIX = re.compile(r"[0-9a-f]{4,64}")
_NAME = re.compile(r"[a-z0-9_][a-z0-9_.-]{0,63}")
_LABEL = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
_VERDICTS = ("pass", "fail", "inconclusive")
_GOLDENS = ".goldens.json"


class Records:
    """The records under one folder. Every change is atomic, and safe beside other processes that make changes."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def ids(self) -> list[str]:
        """All artifact ids, sorted."""
        return sorted(path.stem for path in self.root.glob("*.dvc") if ID.fullmatch(path.stem))

    def pin_file(self, artifact_id: str) -> Path:
        """Where the pin of an id is, or would be."""
        return self.root / f"{artifact_id}.dvc"

    def names(self) -> dict[str, str]:
        """Name -> id, sorted by name."""
        path = self.root / "names.json"
        if not path.exists():
            return {}
        try:
            names = json.loads(path.read_bytes())
            if not all(_NAME.fullmatch(name) and ID.fullmatch(known) for name, known in names.items()):
                raise ValueError("it must map names to full ids")
        except (ValueError, AttributeError, TypeError) as error:
            raise ArtifactError(f"{path} cannot be read: {error}. Repair it or remove it and pin again") from error
        return dict(sorted(names.items()))

    def set_names(self, names: dict[str, str]) -> None:
        """Let names point at ids, leaving all other names as they are."""
        for name in names:
            if not _NAME.fullmatch(name) or _PREFIX.fullmatch(name):
                raise ArtifactError(
                    f"{name!r} cannot be the name of an artifact: a name has 1 to 64 of a-z 0-9 _ . - and cannot be "
                    "read as the beginning of an id"
                )
        with locked(self.root):
            write_whole(self.root / "names.json", canonical_json(self.names() | names))

    def resolve(self, text: str) -> str:
        """The id that a full id, a name or a unique prefix of at least 4 hex digits stands for."""
        ids, names = self.ids(), self.names()
        if text in names:
            if names[text] not in ids:
                raise ArtifactError(f"the name {text!r} points at {names[text][:SHORT]}, which is not in {self.root}")
            return names[text]
        if not _PREFIX.fullmatch(text.lower()):
            raise ArtifactError(
                f"no artifact is named {text!r}, and it is not the beginning of an id (4 to 64 hex digits). "
                f"{self._candidates(ids, names)}"
            )
        matches = [known for known in ids if known.startswith(text.lower())]
        if len(matches) == 1:
            return matches[0]
        if matches:
            raise ArtifactError(
                f"{text!r} is ambiguous: it begins {', '.join(known[:SHORT] for known in matches)}. Give more digits"
            )
        raise ArtifactError(f"no artifact {text!r} in {self.root}. {self._candidates(ids, names)}")

    def put_statement(self, artifact_id: str, folder: Path) -> Path:
        """Record `folder`/statement.json (and goldens.json, if there) as the newest evaluation of an artifact.

        The statement must be about this very id; its predicate has `device_class`, `evaluation` and `verdict`.
        """
        source = folder / "statement.json"
        if not source.is_file():
            raise ArtifactError(f"{folder} holds no statement.json: evaluate the artifact first")
        statement = _read_statement(source, artifact_id)
        predicate = statement["predicate"]
        label = f"{predicate['device_class']}-{predicate['evaluation']}"
        target = self.root / "evaluations" / artifact_id / f"{label}.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        with locked(self.root):
            goldens = target.with_name(label + _GOLDENS)
            goldens.unlink(missing_ok=True)
            if (folder / "goldens.json").is_file():
                write_whole(goldens, (folder / "goldens.json").read_bytes())
            write_whole(target, source.read_bytes())
        return target

    def evaluations(self, artifact_id: str) -> list[Statement]:
        """All statements about an id, the newest last."""
        return [_read_statement(path, artifact_id) for path in self._statement_files(artifact_id)]

    def goldens(self, artifact_id: str, device_class: str) -> list[Path]:
        """The goldens files recorded for an id on a device class, the newest last."""
        files = [
            path.with_name(path.stem + _GOLDENS)
            for path in self._statement_files(artifact_id)
            if _read_statement(path, artifact_id)["predicate"]["device_class"] == device_class
        ]
        return [path for path in files if path.is_file()]

    def put_provenance(self, artifact_id: str, content: dict[str, Any]) -> None:
        """Record how an artifact was built, in the place of what was known before."""
        path = self._provenance_file(artifact_id)
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(self.root):
            write_whole(path, canonical_json(content))

    def provenance(self, artifact_id: str) -> dict[str, Any] | None:
        """How an artifact was built; None where that was not recorded. ArtifactError for a file that is damaged."""
        path = self._provenance_file(artifact_id)
        if not path.is_file():
            return None
        try:
            return read_object(path)
        except ValueError as error:
            raise ArtifactError(f"{path} cannot be read: {error}. Remove it and build the artifact again") from error

    def places(self) -> dict[str, str]:
        """Where sources lay on this machine, by their identity: a guess, none where the file is damaged."""
        try:
            return {str(key): str(place) for key, place in read_object(self.root / "places.json").items()}
        except (OSError, ValueError):
            return {}

    def add_places(self, places: dict[str, str]) -> None:
        """Remember where sources lie."""
        with locked(self.root):
            write_whole(self.root / "places.json", canonical_json(self.places() | places))

    def copy_to(self, other: Records, artifact_id: str) -> None:
        """Copy all that is known of an id into other records, names apart; an evaluation that is newer there stays."""
        other.root.mkdir(parents=True, exist_ok=True)
        target = other.root / "evaluations" / artifact_id
        with locked(other.root):
            for path in self._statement_files(artifact_id):
                target.mkdir(parents=True, exist_ok=True)
                known = target / path.name
                if known.exists() and known.stat().st_mtime_ns >= path.stat().st_mtime_ns:
                    continue
                for source in (path.with_name(path.stem + _GOLDENS), path):
                    if source.exists():
                        write_whole(target / source.name, source.read_bytes(), like=source)
            if (known := self._provenance_file(artifact_id)).is_file():
                other._provenance_file(artifact_id).parent.mkdir(parents=True, exist_ok=True)
                write_whole(other._provenance_file(artifact_id), known.read_bytes())
            # Last, because with the pin the id is known there.
            write_whole(other.pin_file(artifact_id), self.pin_file(artifact_id).read_bytes())

    def _provenance_file(self, artifact_id: str) -> Path:
        return self.root / "provenance" / f"{artifact_id}.json"

    def _statement_files(self, artifact_id: str) -> list[Path]:
        folder = self.root / "evaluations" / artifact_id
        files = [path for path in folder.glob("*.json") if not path.name.endswith(_GOLDENS)]
        return sorted(files, key=lambda path: (path.stat().st_mtime_ns, path.name))

    def _candidates(self, ids: list[str], names: dict[str, str]) -> str:
        known = [f"{name} ({target[:SHORT]})" for name, target in names.items()]
        known += [artifact_id[:SHORT] for artifact_id in ids if artifact_id not in names.values()]
        if not known:
            return f"{self.root} holds no artifacts: build one or pull one"
        more = f" and {len(known) - 10} more" if len(known) > 10 else ""
        return f"Known: {', '.join(known[:10])}{more}"


def _read_statement(path: Path, artifact_id: str) -> Statement:
    """An in-toto statement, its form and its subject checked."""
    try:
        statement: Statement = json.loads(path.read_bytes())
        if statement["_type"] != _STATEMENT_TYPE:
            raise ValueError(f"its _type is not {_STATEMENT_TYPE}")
        subjects = [subject["digest"]["sha256"] for subject in statement["subject"]]
        predicate = statement["predicate"]
        if predicate["verdict"] not in _VERDICTS:
            raise ValueError(f"its verdict {predicate['verdict']!r} is none of {', '.join(_VERDICTS)}")
        for key in ("device_class", "evaluation"):
            if not isinstance(predicate[key], str) or not _LABEL.fullmatch(predicate[key]):
                raise ValueError(f"its {key} {predicate[key]!r} is not a word of letters, digits, _ . and -")
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path} is not a statement about an artifact: {type(error).__name__}: {error}") from error
    if subjects != [artifact_id]:
        about = ", ".join(str(subject)[:SHORT] for subject in subjects)
        raise ArtifactError(f"{path} is a statement about {about}, not about {artifact_id[:SHORT]}")
    return statement


def write_whole(path: Path, content: bytes, *, like: Path | None = None) -> None:
    """Write a file so that it is there whole or not at all, with the times of `like` if given."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        if like is not None:
            shutil.copystat(like, name)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


@contextmanager
def locked(root: Path) -> Iterator[None]:
    """Hold the lock of the records under `root`; other processes wait."""
    with (root / ".lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
