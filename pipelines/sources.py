"""Digests of what a build starts from: checkpoints and texts. Content is hashed once and remembered by file identity.

A source is written in a slice as a record without a path:
    {"kind": "folder", "digest": SHA256}                          a checkpoint folder
    {"kind": "hub", "repo": "org/name", "revision": 40 hex}       a hub repository at one commit
    with "allow_bin": true where a checkpoint's pickled weights are read as well
    {"kind": "text", "digest": SHA256}                            a .txt or .jsonl file, or a folder of them
    {"kind": "chat", "digest": SHA256}                            a .jsonl file of conversations, or a folder of them
    {"kind": "dataset", "name": "wikitext2", "digest": SHA256}    a local copy of a named data set
    {"kind": "dataset", "name": "wikitext2", "revision": 40 hex}  the named data set from the hub
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer*.json",
    "tokenizer.model",
    "qwen.tiktoken",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
)
PICKLED_FILES = ("pytorch_model*.bin", "pytorch_model.bin.index.json", "consolidated.*.pth", "params.json")
"""Read only where the model's entry in conf/ says `allow_bin: true`. Meta's checkpoints have params.json."""
TEXT_FILES = ("*.txt", "*.jsonl")
CHAT_FILES = ("*.jsonl",)
# Those of MODEL_FILES that say how text becomes ids.
TOKENIZER_FILES = (
    "tokenizer*.json",
    "tokenizer.model",
    "qwen.tiktoken",
    "special_tokens_map.json",
    "added_tokens.json",
)
_CHUNK = 1 << 22


def identity(record: Mapping[str, Any]) -> str:
    """The key of a source in `build/paths.json`: what the record says, in one line."""
    if record["kind"] == "hub":
        return f"hub:{record['repo']}@{record['revision']}"
    if record.get("digest"):
        return f"sha256:{record['digest']}"
    return f"dataset:{record['name']}@{record['revision']}"


class Memory:
    """SHA-256 of files, remembered by path, inode, size and time of change in a JSON file between runs.

    A file younger than two seconds is not remembered: it could change again within its clock's tick.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: dict[str, list[Any]] = {}
        try:
            loaded = json.loads(path.read_text())
            self._known = loaded if isinstance(loaded, dict) else {}
        except (OSError, ValueError):
            self._known = {}  # absent or damaged: everything is hashed again, which is slow and right

    def sha256(self, path: Path) -> str:
        """The SHA-256 of the file's bytes."""
        status = path.stat()
        key, stamp = str(path.resolve()), [status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
        known = self._known.get(key)
        if known and known[:4] == stamp:
            return str(known[4])
        digest = sha256_file(path)
        self._known.pop(key, None)
        if path.stat().st_mtime_ns == status.st_mtime_ns and _age(status) > 2.0:
            self._known[key] = [*stamp, digest]
        return digest

    def save(self) -> None:
        """Write what is remembered; files that are gone are forgotten. A folder that cannot be written is no error."""
        text = json.dumps({k: v for k, v in sorted(self._known.items()) if Path(k).exists()}, indent=0)
        try:
            if self.path.exists() and self.path.read_text() == text:
                return
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary = self.path.with_name(f"{self.path.name}.tmp-{os.getpid()}")
            temporary.write_text(text)
            temporary.replace(self.path)
        except OSError:
            return  # only speed is lost


def sha256_file(path: Path) -> str:
    """The SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(_CHUNK):
            digest.update(piece)
    return digest.hexdigest()


def model_files(folder: Path, *, allow_bin: bool = False) -> list[Path]:
    """The files that a checkpoint is made of, sorted by name. FileNotFoundError when there is no config.json."""
    if not (folder / "config.json").is_file() and not (allow_bin and (folder / "params.json").is_file()):
        raise FileNotFoundError(
            f"{folder} is not a checkpoint folder: it has no config.json. Give the folder of a Hugging Face checkpoint"
            " (config.json, *.safetensors, tokenizer files)."
        )
    return _matching(folder, (*MODEL_FILES, *PICKLED_FILES) if allow_bin else MODEL_FILES)


def small_files(folder: Path) -> list[Path]:
    """Those of a checkpoint's files that are no weights, sorted by name: its configuration and its tokenizer."""
    return _matching(folder, tuple(pattern for pattern in MODEL_FILES if "safetensors" not in pattern))


def folder_digest(folder: Path, digest: Callable[[Path], str] = sha256_file, *, allow_bin: bool = False) -> str:
    """SHA-256 over the sorted (name, SHA-256) pairs of a checkpoint's files."""
    return _joined(folder, model_files(folder, allow_bin=allow_bin), digest)


def tokenizer_digest(folder: Path, digest: Callable[[Path], str] = sha256_file) -> str:
    """SHA-256 over the sorted (name, SHA-256) pairs of the files by which a checkpoint's text becomes ids."""
    return _joined(folder, _matching(folder, TOKENIZER_FILES), digest)


def text_files(path: Path, patterns: tuple[str, ...] = TEXT_FILES) -> list[Path]:
    """The .txt and .jsonl files of a text source (or those of `patterns`): the file itself, or a folder's, by name."""
    kinds = " or ".join(pattern.removeprefix("*") for pattern in patterns)
    if path.is_file():
        if not any(fnmatch.fnmatch(path.name, pattern) for pattern in patterns):
            raise ValueError(f"{path} is not a text source: give a {kinds} file, or a folder of them.")
        return [path]
    files = _matching(path, patterns) if path.is_dir() else []
    if not files:
        raise FileNotFoundError(f"{path} holds no text: give a {kinds} file, or a folder of them.")
    return files


def text_digest(path: Path, digest: Callable[[Path], str] = sha256_file, patterns: tuple[str, ...] = TEXT_FILES) -> str:
    """SHA-256 of one text file's bytes, or over the (name, SHA-256) pairs of a folder's."""
    files = text_files(path, patterns)
    return digest(path) if path.is_file() else _joined(path, files, digest)


def tree_digest(path: Path, digest: Callable[[Path], str] = sha256_file) -> str:
    """SHA-256 of a file, or over the (relative name, SHA-256) pairs of every file below a folder."""
    if path.is_file():
        return digest(path)
    files = sorted(p for p in path.rglob("*") if p.is_file() and not any(x.startswith(".") for x in p.parts[-2:]))
    if not files:
        raise FileNotFoundError(f"{path} is empty or does not exist: give a local copy of the data set.")
    return _joined(path, files, digest)


def measure(record: Mapping[str, Any], path: Path, digest: Callable[[Path], str] = sha256_file) -> str:
    """The digest of what lies at `path`, taken the way that the record's kind says."""
    if record["kind"] == "folder":
        return folder_digest(path, digest, allow_bin=pickled(record))
    if record["kind"] == "dataset":
        return tree_digest(path, digest)
    return text_digest(path, digest, CHAT_FILES if record["kind"] == "chat" else TEXT_FILES)


def pickled(record: Mapping[str, Any]) -> bool:
    """Whether the pickled weights of a checkpoint may be read (as weights alone, without running code)."""
    return bool(record.get("allow_bin", False))


def _matching(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    return sorted(
        (p for p in folder.iterdir() if p.is_file() and any(fnmatch.fnmatch(p.name, x) for x in patterns)),
        key=lambda p: p.name,
    )


def _joined(folder: Path, files: list[Path], digest: Callable[[Path], str]) -> str:
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:  # hashlib frees the interpreter lock
        digests = list(pool.map(digest, files))
    pairs = [[p.relative_to(folder).as_posix(), d] for p, d in zip(files, digests, strict=True)]
    return hashlib.sha256(json.dumps(sorted(pairs), separators=(",", ":")).encode()).hexdigest()


def _age(status: os.stat_result) -> float:
    return time.time() - max(status.st_mtime, status.st_ctime)
