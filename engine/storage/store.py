"""The store: artifacts by id, what is known about them, and whether they may be served. Free of torch.

<store>/<id>/     the artifact, hard links into the cache
<store>/<id>.dvc  evaluations/<id>/  provenance/  names.json     see `records`
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from engine.storage.artifacts import SHORT, ArtifactError, verify, verify_md5
from engine.storage.dvc_cache import DvcCache, pin_text
from engine.storage.records import Records, Statement, locked, write_whole

logger = logging.getLogger(__name__)
_TEMPORARY = ".put-"
_STALE_SECONDS = 24 * 3600


class Store:
    """The artifacts under one folder, beside which other processes may put theirs."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self._records = Records(self.root)
        self._cache = DvcCache(self.root)

    def init(self, cache_dir: Path) -> None:
        """Make the store, on a DVC cache that a project shares with it; does nothing where there is one."""
        self.root.mkdir(parents=True, exist_ok=True)
        with locked(self.root):
            self._cache.init(cache_dir)

    def put(self, folder: Path) -> str:
        """Verify an artifact and take it in under its id. Putting it again is harmless and repairs what is damaged."""
        manifest, md5 = verify_md5(folder)
        self._remove_stale()
        digest = self._cache.keep(folder, md5)
        target = self.root / manifest.id
        damaged = target.is_dir()
        if not damaged or not self._is_whole(target, manifest.id):
            temporary = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=self.root))
            try:
                self._cache.materialize(temporary / "new", md5)
                with locked(self.root):
                    if damaged and target.exists():
                        target.rename(temporary / "old")
                    # Where there was none, another process may have put the same meanwhile.
                    if not target.exists():
                        (temporary / "new").rename(target)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
        self._write_pin(manifest.id, digest, folder, md5)
        return manifest.id

    def path(self, artifact_id: str) -> Path:
        """The folder of an artifact (not verified here), restored from the cache when it is gone."""
        if not (self.root / artifact_id).is_dir():
            self.restore(artifact_id)
        return self.root / artifact_id

    def restore(self, artifact_id: str) -> Path:
        """Bring an artifact back whole from the DVC cache, and prove it. Needs nothing but its pin and the cache."""
        target = self.root / artifact_id
        if target.is_dir() and self._is_whole(target, artifact_id):
            return target
        pin = self._records.pin_file(artifact_id)
        if not pin.is_file():
            raise ArtifactError(f"no artifact {artifact_id[:SHORT]} in {self.root}: build it or pull it")
        # Away first: DVC takes a file for unchanged when its size and times are.
        shutil.rmtree(target, ignore_errors=True)
        try:
            self._cache.restore(pin)
            verify(target, artifact_id)
        except ArtifactError as error:
            shutil.rmtree(target, ignore_errors=True)
            removed = self._cache.evict_damaged(pin)
            damage = f" ({removed} damaged files were removed from the cache)" if removed else ""
            raise ArtifactError(
                f"artifact {artifact_id[:SHORT]} cannot be restored from the cache{damage}: {error}. "
                "Pull it from a remote that has it, or build it again"
            ) from error
        return target

    def ids(self) -> list[str]:
        """All artifact ids, sorted."""
        return self._records.ids()

    def names(self) -> dict[str, str]:
        """Name -> id."""
        return self._records.names()

    def resolve(self, text: str) -> str:
        """The id that a full id, a name or a unique prefix of at least 4 hex digits stands for."""
        return self._records.resolve(text)

    def pin(self, name: str, artifact_id: str) -> None:
        """Let a name point at an artifact of this store; a name that exists is moved."""
        self._records.set_names({name: self.resolve(artifact_id)})

    def put_statement(self, artifact_id: str, folder: Path) -> Path:
        """Record the statement.json (and goldens.json) of an evaluation; it must be about this very artifact."""
        return self._records.put_statement(self.resolve(artifact_id), folder)

    def put_provenance(self, artifact_id: str, content: dict[str, Any], places: dict[str, str]) -> None:
        """Record how an artifact of this store was built, and where its sources lie, which stays on this machine."""
        self._records.put_provenance(self.resolve(artifact_id), content)
        self._records.add_places(places)

    def places(self) -> dict[str, str]:
        """Where sources lay on this machine, by their identity."""
        return self._records.places()

    def provenance(self, artifact_id: str) -> dict[str, Any] | None:
        """How an artifact was built; None where that was not recorded."""
        return self._records.provenance(self.resolve(artifact_id))

    def evaluations(self, artifact_id: str) -> list[Statement]:
        """All statements about an artifact, the newest last."""
        return self._records.evaluations(artifact_id)

    def goldens(self, artifact_id: str, device_class: str) -> list[Path]:
        """The goldens recorded for an artifact on a device class, the newest last."""
        return self._records.goldens(artifact_id, device_class)

    def servable(self, artifact_id: str, waiver: str | None = None) -> dict[str, str | None]:
        """What the newest statement says, for the server to show: id, verdict, evaluation, device_class, waiver.

        ArtifactError when it is not `pass` (or there is none) and no waiver gives a reason; a waiver used is logged.
        """
        artifact_id, waiver = self.resolve(artifact_id), (waiver or "").strip() or None
        statements = self.evaluations(artifact_id)
        newest = statements[-1]["predicate"] if statements else {}
        verdict = newest.get("verdict")
        if verdict != "pass":
            short = artifact_id[:SHORT]
            if verdict is None:
                said = f"artifact {short} has no evaluation"
            else:
                said = (
                    f"artifact {short} was evaluated by {newest['evaluation']} on {newest['device_class']}: {verdict}"
                )
            if waiver is None:
                raise ArtifactError(
                    f"{said}. Only what has passed is served: `ingot gate` shows what was missed and `dvc repro` "
                    'evaluates; to serve it all the same, give a reason: waiver="..."'
                )
            logger.warning("%s; served on a waiver: %s", said, waiver)
        return {
            "id": artifact_id,
            "verdict": verdict,
            "evaluation": newest.get("evaluation"),
            "device_class": newest.get("device_class"),
            "waiver": waiver,
        }

    def push(self, remote: str | Path, artifact_id: str) -> str:
        """Copy an artifact with its pin, evaluations and names to a remote folder, after proving it; returns its id."""
        folder = _local_folder(remote)
        artifact_id = self.resolve(artifact_id)
        _, md5 = verify_md5(self.path(artifact_id), artifact_id)
        self._cache.keep(self.root / artifact_id, md5)
        folder.mkdir(parents=True, exist_ok=True)
        self._cache.push(self._records.pin_file(artifact_id), folder)
        there = Records(folder / "ingot")
        self._records.copy_to(there, artifact_id)
        there.set_names({name: known for name, known in self.names().items() if known == artifact_id})
        return artifact_id

    def pull(self, remote: str | Path, text: str) -> str:
        """Fetch an artifact by id, prefix or name from a remote folder, and prove it; returns its id.

        Evaluations and names come along. A name that points at another artifact here is moved only when it was asked
        for; otherwise it stays, with a warning.
        """
        folder = _local_folder(remote)
        there = Records(folder / "ingot")
        if not there.root.is_dir():
            raise ArtifactError(f"{folder} is not a remote of a store: it has no folder `ingot`. Push to it first")
        artifact_id = there.resolve(text)
        pin = self._records.pin_file(artifact_id)
        known_before = pin.exists()
        write_whole(pin, there.pin_file(artifact_id).read_bytes())
        try:
            self._fetch(pin, folder, artifact_id)
        except ArtifactError:
            if not known_before:
                pin.unlink()
            raise
        there.copy_to(self._records, artifact_id)
        known, taken = self.names(), {}
        for name in (name for name, target in there.names().items() if target == artifact_id):
            if name == text or known.get(name, artifact_id) == artifact_id:
                taken[name] = artifact_id
            else:
                logger.warning("the name %s keeps pointing at %s here", name, known[name][:SHORT])
        self._records.set_names(taken)
        return artifact_id

    def _fetch(self, pin: Path, remote: Path, artifact_id: str) -> None:
        target = self.root / artifact_id
        if target.is_dir():
            if self._is_whole(target, artifact_id):
                return
            shutil.rmtree(target, ignore_errors=True)
            self._cache.evict_damaged(pin)
        self._cache.pull(pin, remote)
        try:
            verify(target, artifact_id)
        except ArtifactError:
            # DVC trusts what lies in the cache: what is damaged there must go before it fetches again.
            shutil.rmtree(target, ignore_errors=True)
            if not self._cache.evict_damaged(pin):
                raise
            self._cache.pull(pin, remote)
            verify(target, artifact_id)

    def _write_pin(self, artifact_id: str, digest: str, folder: Path, md5: dict[str, str]) -> None:
        size = sum((folder / path).stat().st_size for path in md5)
        write_whole(self._records.pin_file(artifact_id), pin_text(artifact_id, digest, size=size, count=len(md5)))

    def _remove_stale(self) -> None:
        # What a killed process has left; a day is longer than any put takes.
        for path in self.root.glob(f"{_TEMPORARY}*"):
            if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(path, ignore_errors=True)

    def _is_whole(self, folder: Path, artifact_id: str) -> bool:
        try:
            verify(folder, artifact_id)
        except ArtifactError as error:
            logger.warning("it will be replaced: %s", error)
            return False
        return True


def _local_folder(remote: str | Path) -> Path:
    text = str(remote)
    if "://" in text:
        raise ArtifactError(f"remote {text!r} is not a local folder, and only local folders are supported as remotes")
    return Path(text).expanduser().absolute()
