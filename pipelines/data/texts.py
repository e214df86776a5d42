"""Documents of a text source: the user's own .txt and .jsonl files, and named data sets from a copy or from the hub."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pipelines.slices import locate
from pipelines.sources import text_files

# A line of a .txt file that ends a document. A file without it is one document.
DOCUMENT_END = "<|endoftext|>"
# Files of the hub's repository that hold enough text, where the whole data set is far too large to fetch.
HUB_FILES = {
    "c4": {"train": "en/c4-train.00000-of-01024.json.gz", "validation": "en/c4-validation.00000-of-00008.json.gz"}
}
SPLIT_WORDS = {"train": ("train",), "validation": ("valid", "val."), "test": ("test",)}
TEXT_SUFFIXES = (".txt", ".raw", ".tokens")
ROW_SUFFIXES = (".jsonl", ".json", ".json.gz", ".jsonl.gz")
COPY_SUFFIXES = (*TEXT_SUFFIXES, *ROW_SUFFIXES, ".parquet")


def read_documents(record: Mapping[str, Any], *, locate: Callable[[Mapping[str, Any]], Path] = locate) -> list[str]:
    """The documents of a source record of kind `text` or `dataset`, in the order of the source, empty ones left out.

    A record with a digest is read from this machine; a data set without one is fetched from the hub at its revision.
    ValueError or FileNotFoundError names the file and what is wrong with it.
    """
    column = record["column"]
    if record["kind"] == "text":
        files = text_files(locate(record))
    elif record.get("digest"):
        files = copy_files(locate(record), record.get("split"))
    else:
        return _filled(_from_hub(record), f"the data set {record['name']}")
    return _filled((text for file in files for text in read_file(file, column)), str(files[0].parent))


def read_rows(record: Mapping[str, Any], *, locate: Callable[[Mapping[str, Any]], Path] = locate) -> list[str]:
    """The rows of a data set as the hub counts them, empty ones too; of a copy in plain text, as the hub made them."""
    if record.get("digest"):
        files = copy_files(locate(record), record.get("split"))
        rows = [row for file in files for row in _rows_of(file, record)]
    else:
        rows = list(_from_hub(record))
    _filled(iter(rows), f"the data set {record['name']}")
    return rows


def read_file(path: Path, column: str) -> Iterator[str]:
    """The documents of one file: rows of .jsonl or .parquet by their `column`, or a text cut at DOCUMENT_END lines."""
    if path.suffix == ".parquet":
        yield from _parquet_rows(path, column)
    elif path.name.endswith(ROW_SUFFIXES):
        yield from (_field(row, column, where) for where, row in json_rows(path))
    else:
        yield from _cut_documents(_read_text(path))


def copy_files(path: Path, split: str | None) -> list[Path]:
    """The files of a local copy of a data set that belong to `split`, by their names; all if no name says a split."""
    if path.is_file():
        return [path]
    found = sorted(p for p in path.rglob("*") if p.is_file() and p.name.endswith(COPY_SUFFIXES))
    if not found:
        raise FileNotFoundError(f"{path} holds no text: a copy of a data set has files of {', '.join(COPY_SUFFIXES)}.")
    marked = [p for p in found if any(word in p.name for words in SPLIT_WORDS.values() for word in words)]
    if split is None or not marked:
        return found
    wanted = [p for p in marked if any(word in p.name for word in SPLIT_WORDS.get(split, (split,)))]
    if not wanted:
        raise FileNotFoundError(
            f"{path} has no file of the split {split!r}; it has {', '.join(p.name for p in marked[:6])}. Set `split` "
            "to one that is there, or `path` to the file that is meant."
        )
    return wanted


def _cut_documents(text: str) -> Iterator[str]:
    lines: list[str] = []
    for line in text.splitlines(keepends=True):
        if line.strip() == DOCUMENT_END:
            yield "".join(lines)
            lines = []
        else:
            lines.append(line)
    yield "".join(lines)


def json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Where each line of a file of JSON lines stands, in words, and its value. ValueError names one that is none."""
    with path.open("rb") as raw, gzip.open(raw) if path.suffix == ".gz" else raw as lines:
        for number, line in enumerate(_whole(lines, path), start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
                if b"\\u" in line:
                    json.dumps(row, ensure_ascii=False).encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"{path}, line {number} has half of a surrogate pair, which is no text") from error
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number} is not JSON ({error}): give one object a line") from error
            yield f"{path}, line {number}", row


def _whole(lines: Iterable[bytes], path: Path) -> Iterator[bytes]:
    try:
        yield from lines
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is damaged ({error}): fetch it again") from error


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): convert it") from error


def _rows_of(path: Path, record: Mapping[str, Any]) -> Iterator[str]:
    """A row for each line of a plain copy of wikitext2 or ptb, as the builders of those data sets make them."""
    if not path.name.endswith(TEXT_SUFFIXES) or record["name"] not in ("wikitext2", "ptb"):
        yield from read_file(path, record["column"])
        return
    for line in io.StringIO(_read_text(path)):
        if record["name"] == "ptb":
            yield line.strip()
        else:
            yield line if line.strip() else ""


def _parquet_rows(path: Path, column: str) -> Iterator[str]:
    import pyarrow.parquet  # type: ignore[import-untyped]

    with pyarrow.parquet.ParquetFile(path) as opened:
        if column not in opened.schema_arrow.names:
            raise ValueError(f"{path} has no column {column!r}; it has {', '.join(opened.schema_arrow.names)}.")
        for rows in opened.iter_batches(columns=[column]):
            yield from (str(text) for text in rows.column(0).to_pylist())


def _from_hub(record: Mapping[str, Any]) -> Iterator[str]:
    import datasets

    name, split, column = record["name"], record["split"], record["column"]
    files = HUB_FILES.get(name, {}).get(split)
    which = {"data_files": {split: files}} if files else {"name": record["subset"]}
    try:
        rows = datasets.load_dataset(record["repo"], revision=record["revision"], split=split, **which)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"The data set {name} ({record['repo']} at {record['revision']}) cannot be had from the hub here: {error}. "
            "Set its `path` to a local copy."
        ) from error
    for number, row in enumerate(rows):
        yield _field(row, column, f"{name}, row {number}")


def _field(row: Any, column: str, where: str) -> str:
    if not isinstance(row, Mapping) or not isinstance(row.get(column), str):
        has = ", ".join(row) if isinstance(row, Mapping) else type(row).__name__
        raise ValueError(
            f"{where} has no text in {column!r} (it has {has}): set `column` to the field with the text, or, to "
            "calibrate on conversations, `kind` to chat."
        )
    return str(row[column])


def _filled(documents: Iterator[str], where: str) -> list[str]:
    found = [document for document in documents if document.strip()]
    if not found:
        raise ValueError(f"{where} holds no text at all.")
    return found
