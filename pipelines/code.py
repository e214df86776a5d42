"""Which files hold the code that a stage can reach, read from the import statements alone: nothing is imported.

compose writes their digests, one file a stage, on which every instance of the stage depends: an edit reruns exactly the
stages that could compute something else, without a list in dvc.yaml that someone has to keep.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

PACKAGES = ("engine", "pipelines")
RECIPES = "pipelines.quant"
# Folders of files that a module reads and does not import.
READ = {
    "engine/kernels/c_library.py": "engine/kernels/c",
    "engine/storage/triton_repository.py": "engine/storage/triton_models",
    "pipelines/template_files.py": "pipelines/templates",
}


class Code:
    """The project's code under `root`, as it is now."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._imports = cache(self._read_imports)
        self._file = cache(self._find_file)

    def digests(self, stage: str, recipe: str | None = None) -> dict[str, str]:
        """File -> SHA-256 of everything that `pipelines.<stage>` can reach; with a recipe, of its package too."""
        roots = {f"pipelines.{stage}"} | (set(self._package(f"{RECIPES}.{recipe}")) if recipe else set())
        return {path: hashlib.sha256((self.root / path).read_bytes()).hexdigest() for path in sorted(self.files(roots))}

    def files(self, modules: set[str]) -> set[str]:
        """The files of the modules and of all that they import, relative to the root; empty packages are left out."""
        reached: set[str] = set()
        waiting = set(modules)
        while waiting:
            module = waiting.pop()
            reached.add(module)
            packages = {module.rsplit(".", count)[0] for count in range(1, module.count(".") + 1)}
            waiting |= (self._imports(module) | packages) - reached
        files = {path.relative_to(self.root).as_posix() for name in reached if (path := self._file(name))}
        code = {name for name in files if (self.root / name).stat().st_size}
        folders = [self.root / READ[name] for name in code & READ.keys()]
        data = {path for folder in folders for path in folder.rglob("*") if "__pycache__" not in path.parts}
        return code | {path.relative_to(self.root).as_posix() for path in data if path.is_file()}

    def _read_imports(self, module: str) -> frozenset[str]:
        path = self._file(module)
        if path is None:
            return frozenset()
        names: set[str] = set()
        for node in _statements(ast.parse(path.read_bytes(), filename=str(path)).body):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        return frozenset(name for name in names if name.partition(".")[0] in PACKAGES and self._file(name))

    def _find_file(self, module: str) -> Path | None:
        """The file of a module or package of the project; None for a name within one, or a module of others."""
        path = self.root.joinpath(*module.split("."))
        found = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        return found if found.is_file() else None

    def _package(self, name: str) -> Iterator[str]:
        """The modules of a package, itself first."""
        yield name
        for path in (self.root / name.replace(".", "/")).rglob("*.py"):
            if path.name != "__init__.py":
                yield path.relative_to(self.root).with_suffix("").as_posix().replace("/", ".")


def _statements(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """Every statement, nested ones too. Expressions hold no imports, and walking them takes most of the time."""
    for statement in body:
        yield statement
        for name in ("body", "orelse", "finalbody"):
            yield from _statements(getattr(statement, name, ()))
        for branch in (*getattr(statement, "handlers", ()), *getattr(statement, "cases", ())):
            yield from _statements(branch.body)
