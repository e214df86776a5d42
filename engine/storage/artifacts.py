"""The manifest of an artifact: what it is made of, its id, and the proof that every byte is still there. Torch-free.
(Above 300 lines: reading, writing and proving are one contract, and no part of it means anything alone.)
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from engine.config import Recipe
from engine.wording import cut, shown

MANIFEST = "manifest.json"
FORMAT = 2
SHORT = 12
_DIGEST = re.compile(r"[0-9a-f]{64}")
_BLOCK = 1 << 20
_SHOWN = 20
_AGAIN = "`dvc repro -s -f publish` writes it again where it was built, `ingot artifacts pull` fetches what was pushed."
LONGEST_PATH = 255


class ArtifactError(ValueError):
    """An artifact that is damaged, unknown, ambiguous or not allowed to be served; the text says what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """A regular file of an artifact; `path` is relative, with forward slashes."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What an artifact is. `id` is the SHA-256 of the canonical bytes of manifest.json."""

    id: str
    recipe: Recipe
    tp: int
    sources: Mapping[str, str]
    calibration: Mapping[str, str] | None
    chat_template: str | None
    files: tuple[FileEntry, ...]

    @property
    def size(self) -> int:
        """Bytes of all files, the manifest apart."""
        return sum(entry.size for entry in self.files)


def canonical_json(value: object) -> bytes:
    """The one way to write a JSON value: sorted keys, no spaces, UTF-8, a newline at the end; no NaN."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode() + b"\n"


def write_manifest(
    folder: Path,
    *,
    recipe: Recipe,
    sources: Mapping[str, str],
    calibration: Mapping[str, str] | None,
    chat_template: str | None,
    tp: int,
    written: Iterable[FileEntry] = (),
) -> str:
    """Hash every file under `folder`, write manifest.json beside them and return the id.

    `sources` maps file names of the checkpoint to their SHA-256, `calibration` what was calibrated on, None where
    nothing was: `declared`, `blocks`, `tokenizer` and, for chats, `template`. `chat_template` is a digest too.
    `written` are files that were hashed while they were written, and are not read again.
    Refuses links, empty folders and anything that is not a regular file, naming it, and what is not as it was written.
    """
    for what, digest in [*sources.items(), *(calibration or {}).items(), ("chat_template", chat_template)]:
        if digest is not None and not _DIGEST.fullmatch(digest):
            raise ArtifactError(f"the digest of {what} is {digest!r}: a manifest needs 64 lower-case hex digits")
    found, refused = list_files(folder)
    if refused:
        raise ArtifactError(f"{folder} cannot become an artifact: {_listed(refused)}")
    found.pop(MANIFEST, None)
    known = {entry.path: entry for entry in written}
    if changed := [path for path, entry in known.items() if found.get(path) != entry.size]:
        raise ArtifactError(f"{folder / changed[0]} is not as it was written, {known[changed[0]].size} bytes long")
    digests = {path: entry.sha256 for path, entry in known.items()}
    digests |= {path: sha256 for path, (sha256, _) in hash_files(folder, found.keys() - known.keys()).items()}
    content = {
        "format": FORMAT,
        "recipe": recipe.fields(),
        "tp": tp,
        "sources": dict(sources),
        "calibration": None if calibration is None else dict(calibration),
        "chat_template": chat_template,
        "files": [{"path": path, "size": found[path], "sha256": digests[path]} for path in sorted(found)],
    }
    raw = canonical_json(content)
    _parse(raw, folder / MANIFEST)
    # Never written in place: an older manifest may be a hard link to something that must not change.
    (folder / MANIFEST).unlink(missing_ok=True)
    (folder / MANIFEST).write_bytes(raw)
    return hashlib.sha256(raw).hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an artifact, with its own form checked but no file looked at."""
    path = folder / MANIFEST
    if path.is_symlink() or not path.is_file():
        raise ArtifactError(f"{folder} is not an artifact: it has no {MANIFEST} that is a regular file")
    return _parse(path.read_bytes(), path)


def verify(folder: Path, expected_id: str | None = None, *, later: Container[str] = ()) -> Manifest:
    """Hash every byte of an artifact; ArtifactError names every file that is flipped, missing, extra or truncated.

    Without `expected_id` the manifest itself is believed. Files of `later` are there and have their size: their bytes
    are for `verify_digests`.
    """
    manifest, _ = verify_md5(folder, expected_id, with_md5=False, later=later)
    return manifest


def verify_digests(folder: Path, manifest: Manifest, later: Iterable[str], digests: Mapping[str, str]) -> None:
    """ArtifactError where a file of `later` is not the manifest's. `digests` has the SHA-256 of some as they were read;
    the others are hashed here."""
    expected = {entry.path: entry.sha256 for entry in manifest.files}
    later = [path for path in later if path in expected]
    hashed = hash_files(folder, [path for path in later if path not in digests])
    found = {**digests, **{path: digest for path, (digest, _) in hashed.items()}}
    _refuse(folder, manifest, [f"{path} has changed" for path in later if found[path] != expected[path]])


def verify_md5(
    folder: Path, expected_id: str | None = None, *, with_md5: bool = True, later: Container[str] = ()
) -> tuple[Manifest, dict[str, str]]:
    """`verify`, and the MD5 of every file (the manifest too) from the same reading."""
    manifest = read_manifest(folder)
    if expected_id is not None and manifest.id != expected_id:
        raise ArtifactError(
            f"{folder / MANIFEST} does not have the id that was asked for: {manifest.id} instead of {expected_id}. "
            "The manifest was changed or the folder is another artifact"
        )
    found, problems = list_files(folder)
    found.pop(MANIFEST, None)
    expected = {entry.path: entry for entry in manifest.files}
    problems += [f"{path} is missing" for path in expected if path not in found]
    problems += [f"{path} is not in the manifest" for path in found if path not in expected]
    whole = []
    for path, size in found.items():
        if path in expected and size != expected[path].size:
            problems.append(f"{path} has {size} bytes instead of {expected[path].size}")
        elif path in expected and path not in later:
            whole.append(path)
    digests = hash_files(folder, whole, with_md5=with_md5)
    problems += [f"{path} has changed" for path in whole if digests[path][0] != expected[path].sha256]
    _refuse(folder, manifest, problems)
    md5 = {path: digest for path, (_, digest) in digests.items()}
    if with_md5:
        md5 |= {path: digest for path, (_, digest) in hash_files(folder, [MANIFEST], with_md5=True).items()}
    return manifest, md5


def _refuse(folder: Path, manifest: Manifest, problems: Sequence[str]) -> None:
    if problems:
        raise ArtifactError(f"artifact {manifest.id[:SHORT]} in {folder} is damaged: {_listed(sorted(problems))}")


def list_files(folder: Path) -> tuple[dict[str, int], list[str]]:
    """The regular files under a folder (relative path -> size, sorted), and what may not be in an artifact, as text."""
    if folder.is_symlink() or not folder.is_dir():
        raise ArtifactError(f"{folder} is not a folder")
    files: dict[str, int] = {}
    refused: list[str] = []
    for path, entry in _walk(folder, ""):
        if entry is None:
            refused.append(f"{path or '.'} is an empty folder")
        elif entry.is_symlink():
            refused.append(f"{path} is a link")
        elif not stat.S_ISREG((status := entry.stat(follow_symlinks=False)).st_mode):
            refused.append(f"{path} is not a regular file")
        elif (problem := _path_problem(path)) is not None:
            refused.append(f"{path!r} {problem}")
        else:
            files[path] = status.st_size
    return dict(sorted(files.items())), refused


def hash_files(folder: Path, paths: Iterable[str], *, with_md5: bool = False) -> dict[str, tuple[str, str]]:
    """(SHA-256, MD5 or "") of files, in threads (hashlib lets go of the interpreter lock), a block at a time."""
    paths = list(paths)

    def digest(path: str) -> tuple[str, str]:
        return hash_file(folder / path, with_md5=with_md5)

    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as threads:
        return dict(zip(paths, threads.map(digest, paths), strict=True))


def hash_file(path: Path, *, with_md5: bool = False) -> tuple[str, str]:
    """(SHA-256, MD5 or "") of one file, which must not be a link."""
    sha256, md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
    block = bytearray(_BLOCK)
    view = memoryview(block)
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb", buffering=0) as file:
        while count := file.readinto(block):
            sha256.update(view[:count])
            if with_md5:
                md5.update(view[:count])
    return sha256.hexdigest(), md5.hexdigest() if with_md5 else ""


def _walk(folder: Path, prefix: str) -> Iterator[tuple[str, os.DirEntry[str] | None]]:
    """Every entry that is not a folder, and (path, None) for a folder with nothing in it; links are not followed."""
    with os.scandir(folder) as entries:
        listed = sorted(entries, key=lambda entry: entry.name)
    if not listed:
        yield prefix.rstrip("/"), None
    for entry in listed:
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(Path(entry.path), f"{prefix}{entry.name}/")
        else:
            yield prefix + entry.name, entry


def _path_problem(path: str) -> str | None:
    """Why a path may not be in a manifest; None when it may."""
    if not path.isprintable() or "\\" in path or len(path) > LONGEST_PATH:
        return "has a name that is too long, or characters in it that an artifact may not have"
    if path.startswith("/") or any(part in ("", ".", "..") for part in path.split("/")):
        return "leads out of the artifact"
    return None


def _parse(raw: bytes, path: Path) -> Manifest:
    try:
        content = json.loads(raw)
        if canonical_json(content) != raw:
            raise ArtifactError(f"{path} is not in its canonical form: it was changed by hand or by another program")
        if content["format"] != FORMAT:
            raise ArtifactError(f"{path} has format {shown(content['format'])}; this version reads format {FORMAT}")
        manifest = Manifest(
            id=hashlib.sha256(raw).hexdigest(),
            recipe=_recipe(**content["recipe"]),
            tp=_whole(content["tp"], least=1),
            sources=_digests(content["sources"]),
            calibration=None if content["calibration"] is None else _digests(content["calibration"]),
            chat_template=None if content["chat_template"] is None else _digest(content["chat_template"]),
            files=tuple(_entry(**entry) for entry in content["files"]),
        )
        _check_entries(manifest.files, path)
    except ArtifactError:
        raise
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        said = cut(f"{type(error).__name__}: {error}")
        raise ArtifactError(f"{path} is not a manifest that can be read: {said}") from error
    return manifest


def _recipe(*, weights: object, kv: object, group_size: object, **finer: object) -> Recipe:
    return Recipe(weights=_text(weights), kv=_text(kv), group_size=_whole(group_size, least=0), **finer)  # type: ignore[arg-type]


def _entry(*, path: object, size: object, sha256: object) -> FileEntry:
    return FileEntry(path=_text(path), size=_whole(size, least=0), sha256=_digest(sha256))


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{shown(value)} is not a text")
    return value


def _whole(value: object, *, least: int) -> int:
    if type(value) is not int or not least <= value < 2**63:
        raise ValueError(f"{shown(value)} is not a whole number from {least} on")
    return value


def _digests(value: Mapping[str, object]) -> dict[str, str]:
    return {str(name): _digest(digest) for name, digest in dict(value).items()}


def _digest(value: object) -> str:
    if not _DIGEST.fullmatch(_text(value)):
        raise ValueError(f"{shown(value)} is not a SHA-256")
    return _text(value)


def _check_entries(entries: tuple[FileEntry, ...], path: Path) -> None:
    names = [entry.path for entry in entries]
    if names != sorted(set(names)):
        raise ArtifactError(f"{path} lists files twice or out of order")
    for entry in entries:
        problem = _path_problem(entry.path)
        if entry.path == MANIFEST:
            problem = "is the manifest itself"
        if problem:
            raise ArtifactError(f"{path} names a file that it may not: {shown(entry.path)} {problem}")


def _listed(problems: list[str]) -> str:
    shown = "; ".join(problems[:_SHOWN])
    more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    hint = ""
    if any("config.ini has" in problem for problem in problems):
        hint = (
            ". Settings are not edited in an artifact: give them when serving (for example serve.session_len=2048, "
            "serve.cache_max_entry_count=0.5), which changes no file"
        )
    return f"{shown}{more}{hint}. {_AGAIN}"
