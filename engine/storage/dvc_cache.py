"""The part of DVC that a store needs: its cache layout, its pins, and its command line. DVC itself is never imported.

An artifact is kept as DVC keeps a folder: every file at files/md5/<2 hex>/<30 hex>, and the list of them, as JSON, at
the place of its own MD5 with `.dir` behind. So a folder that `dvc repro` has committed costs a store no bytes.
"""

from __future__ import annotations

import configparser
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from engine.storage.artifacts import ArtifactError, hash_file
from engine.storage.records import locked, write_whole

READ_ONLY = 0o444


class DvcCache:
    """A DVC repository without SCM at `root`, on a cache folder that may be shared with others."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._config = root / ".dvc" / "config"

    def init(self, cache: Path) -> None:
        """Make the repository. One that exists keeps its cache, so long as that folder is there."""
        if (known := self.folder()) is not None and known.is_dir():
            return
        cache.mkdir(parents=True, exist_ok=True)
        self._config.parent.mkdir(parents=True, exist_ok=True)
        # Links to files would be refused by `artifacts.verify`, so symlink is not among the ways to restore.
        lines = [
            "[core]",
            "no_scm = True",
            "analytics = false",
            "check_update = false",
            "[cache]",
            f"dir = {_quoted(cache.resolve())}",
            "type = hardlink,copy",
        ]
        write_whole(self._config, "\n".join([*lines, ""]).encode())

    def folder(self) -> Path | None:
        """The cache folder; None where there is no repository yet."""
        config = self._read_config()
        if config is None:
            return None
        return self._config.parent / config.get("cache", "dir", fallback="cache").strip('"')

    def keep(self, folder: Path, md5: Mapping[str, str]) -> str:
        """Put the files of a folder (relative path -> MD5) into the cache; returns the folder's digest, `….dir`.

        A read-only file is linked, one that may still be written to is copied. What lies in the cache already is
        compared and, when it is damaged, replaced.
        """
        for path, digest in md5.items():
            self._keep_file(folder / path, digest)
        listing, digest = directory_listing(md5)
        target = self._object(digest)
        if not target.exists() or target.read_bytes() != listing:
            target.parent.mkdir(parents=True, exist_ok=True)
            write_whole(target, listing)
            target.chmod(READ_ONLY)
        return digest

    def materialize(self, folder: Path, md5: Mapping[str, str]) -> None:
        """Fill an empty folder from the cache, with hard links where the file system allows it."""
        for path, digest in md5.items():
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            link_or_copy(self._object(digest), target)

    def evict_damaged(self, pin: Path) -> int:
        """Remove the objects of a pin whose content is not what their place says, which DVC would go on trusting."""
        found = re.search(r"md5: ([0-9a-f]{32}\.dir)", pin.read_text())
        listing = self._object(found[1]) if found else None
        if found is None or listing is None or not listing.is_file():
            return 0
        damaged = []
        if hash_file(listing, with_md5=True)[1] != found[1].removesuffix(".dir"):
            damaged.append(listing)
        else:
            objects = [self._object(row["md5"]) for row in json.loads(listing.read_bytes())]
            present = [path for path in objects if path.is_file()]
            damaged = [path for path in present if hash_file(path, with_md5=True)[1] != path.parent.name + path.name]
        for path in damaged:
            path.unlink(missing_ok=True)
        return len(damaged)

    def restore(self, pin: Path) -> None:
        """Bring back what a pin names from the cache alone."""
        self._run("checkout", "--force", pin.name)

    def push(self, pin: Path, remote: Path) -> None:
        self._run("push", "--remote", self._remote(remote), pin.name)

    def pull(self, pin: Path, remote: Path) -> None:
        self._run("pull", "--force", "--remote", self._remote(remote), pin.name)

    def _keep_file(self, source: Path, digest: str) -> None:
        target = self._object(digest)
        if target.exists() and (target.samefile(source) or hash_file(target, with_md5=True)[1] == digest):
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".keep-", dir=target.parent))
        try:
            if source.stat().st_mode & 0o222:
                shutil.copyfile(source, temporary / "object")
            else:
                link_or_copy(source, temporary / "object")
            (temporary / "object").chmod(READ_ONLY)
            (temporary / "object").replace(target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _object(self, digest: str) -> Path:
        cache = self.folder()
        if cache is None:
            raise ArtifactError(f"{self.root} is not a store yet: initialize it with a cache folder")
        return cache / "files" / "md5" / digest[:2] / digest[2:]

    def _remote(self, folder: Path) -> str:
        """The name under which DVC knows a remote folder; every pull from it checks what comes."""
        name = f"r{hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:16]}"
        section = f"'remote \"{name}\"'"
        with locked(self.root):
            config = self._read_config()
            if config is None:
                raise ArtifactError(f"{self.root} is not a store yet: initialize it with a cache folder")
            if section not in config:
                added = f"[{section}]\nurl = {_quoted(folder.resolve())}\nverify = true\n"
                write_whole(self._config, self._config.read_bytes() + added.encode())
        return name

    def _read_config(self) -> configparser.ConfigParser | None:
        if not self._config.is_file():
            return None
        config = configparser.ConfigParser(interpolation=None)
        config.read(self._config, encoding="utf-8")
        return config

    def _run(self, *arguments: str) -> None:
        if importlib.util.find_spec("dvc") is None:
            raise ArtifactError("this needs DVC, which is not installed here: pip install dvc")
        command = [sys.executable, "-P", "-m", "dvc", *arguments]
        done = subprocess.run(
            command,
            cwd=self.root,
            env={**os.environ, "DVC_NO_ANALYTICS": "1"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            said = " ".join((done.stderr.strip() or done.stdout.strip()).split())[-600:]
            raise ArtifactError(f"`dvc {' '.join(arguments)}` in {self.root} failed: {said}")


def directory_listing(md5: Mapping[str, str]) -> tuple[bytes, str]:
    """The `.dir` object of a folder and its digest, byte for byte as DVC makes them."""
    rows = [{"md5": md5[path], "relpath": path} for path in sorted(md5)]
    listing = json.dumps(rows, sort_keys=True).encode()
    return listing, f"{hashlib.md5(listing, usedforsecurity=False).hexdigest()}.dir"


def pin_text(artifact_id: str, digest: str, *, size: int, count: int) -> bytes:
    """The content of `<id>.dvc`."""
    rows = [f"- md5: {digest}", f"  size: {size}", f"  nfiles: {count}", "  hash: md5", f"  path: {artifact_id}"]
    return "\n".join(["outs:", *rows, ""]).encode()


def link_or_copy(source: Path, target: Path) -> None:
    """A hard link, or a read-only copy where the file system refuses one (another device, too many links)."""
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)
        target.chmod(READ_ONLY)


def _quoted(path: Path) -> str:
    text = str(path)
    if not text.isprintable() or '"' in text:
        raise ArtifactError(
            f"{text!r} cannot be the path of a cache or remote: it holds a quote or a control character"
        )
    return f'"{text}"'
