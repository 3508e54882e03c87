"""Amalgamate one pipeline module and everything of ours that it imports into a single file.

diffusers' `custom_pipeline=` loads one `pipeline.py`; its own search for further files is a regular expression that
misses siblings of siblings (local folders) and never ends on cycles (Hub). So the file has to be self-contained.
Modules are joined by slicing their source lines, dependencies first: comments and formatting stay as written.
What cannot be joined without changing its meaning is refused with file and line.
"""

from __future__ import annotations

import ast
import builtins
import functools
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "noiseopt"
LINE_LENGTH = 120
# What diffusers takes for an import of a further file, wherever it stands: also inside a docstring.
LOOKS_RELATIVE = re.compile(r"^\s*(from\s+\.\S+\s+import|import\s+\.\S+\s*$)")


class Refused(ValueError):
    """The module cannot be bundled; the message starts with `file:line:`."""


@dataclass(frozen=True, eq=False)
class Module:
    """A parsed source file; `name` is its path relative to the repository root."""

    path: Path
    name: str
    lines: list[str]
    tree: ast.Module

    @classmethod
    def read(cls, path: Path, root: Path) -> Module:
        return cls.parse(path, root, path.read_text(encoding="utf-8"))

    @classmethod
    @functools.cache  # the same module is part of many bundles
    def parse(cls, path: Path, root: Path, source: str) -> Module:
        return cls(path, path.relative_to(root).as_posix(), source.split("\n"), ast.parse(source, str(path)))

    @functools.cached_property
    def imports(self) -> list[ast.Import | ast.ImportFrom]:
        """Every import statement, also inside functions."""
        return [node for node in ast.walk(self.tree) if isinstance(node, (ast.Import, ast.ImportFrom))]

    def refuse(self, line: int, reason: str) -> Refused:
        return Refused(f"{self.name}:{line}: {reason}")


def bundle(entry: Path, root: Path, registering: Path | None = None) -> str:
    """The source of one self-contained file for a pipeline module.

    Args:
        entry: The module, in one of the folders that become sub-packages: `root/pipelines/x.py`.
        root: The folder that holds `pipelines/`, `rewards/` …
        registering: A package folder all of whose public modules are wanted too, imported by `entry` or not: those that
            its `__init__.py` imports. So what is looked up by name in a bundle is what is found in the package.
    """
    root = root.resolve()
    wanted = [*public_modules(registering.resolve(), root), entry.resolve()] if registering else [entry.resolve()]
    modules = in_order(wanted, root)
    for module in modules:
        check_text(module)
    check_names(modules)
    top = f"{header(modules[-1])}\n\n{hoisted(modules)}".rstrip()
    parts = [f"# {module.name}\n\n\n{body}" for module in modules if (body := own_code(module))]
    return "\n\n\n".join([top, *parts]) + "\n"


def public_modules(folder: Path, root: Path) -> list[Path]:
    """The modules that a package's `__init__.py` imports from."""
    return [target for _, target in dependencies(Module.read(folder / "__init__.py", root), root)]


def in_order(wanted: Iterable[Path], root: Path) -> list[Module]:
    """The wanted modules and all that they need: dependencies first, the last one wanted last."""
    done: dict[Path, Module] = {}

    def visit(path: Path, pending: tuple[Path, ...]) -> None:
        module = Module.read(path, root)
        for node, target in dependencies(module, root):
            if target in (*pending, path):
                chain = " -> ".join(p.stem for p in (*pending, path, target))
                raise module.refuse(node.lineno, f"circular import {chain}")
            if target not in done:
                visit(target, (*pending, path))
        done[path] = module

    for path in wanted:
        if path not in done:
            visit(path, ())
    return list(done.values())


def dependencies(module: Module, root: Path) -> Iterator[tuple[ast.ImportFrom, Path]]:
    """Each relative import of `module` with the file it names; the package's folders are siblings under `root`."""
    for node in module.imports:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
        relative = isinstance(node, ast.ImportFrom) and node.level > 0
        if not relative and any(name.split(".")[0] == PACKAGE for name in names):
            raise module.refuse(node.lineno, f"`{PACKAGE}` is not installed where a bundle runs: import relatively")
        if any(alias.name == "*" for alias in node.names):
            raise module.refuse(node.lineno, "a starred import hides which names it binds: import them by name")
        if isinstance(node, ast.ImportFrom) and relative:
            yield node, resolve(module, node, root)


def resolve(module: Module, node: ast.ImportFrom, root: Path) -> Path:
    """The file that a relative import names."""
    if node not in module.tree.body:
        raise module.refuse(node.lineno, "a relative import has to stand at the top level of its module")
    if any(alias.asname for alias in node.names):
        raise module.refuse(node.lineno, "a renamed relative import would be lost in a bundle: use the name as defined")
    if node.module is None:
        raise module.refuse(node.lineno, "import names from the module that defines them, not modules of a package")
    target = module.path.parents[node.level - 1].joinpath(*node.module.split(".")).with_suffix(".py")
    if not target.is_file():
        raise module.refuse(node.lineno, f"no file {node.module.replace('.', '/')}.py: import from the defining module")
    return target


@functools.cache
def check_text(module: Module) -> None:
    """Refuse text that diffusers takes for an import of another file, and code that looks for its own file."""
    dropped = dropped_lines(module)
    for number, line in enumerate(module.lines, start=1):
        if number not in dropped and LOOKS_RELATIVE.match(line):
            raise module.refuse(number, "diffusers reads this text as a relative import: write `>>> from …`")
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Name) and node.id == "__file__":
            raise module.refuse(node.lineno, "a bundle has no files beside it: `__file__` does not find them")


def check_names(modules: Iterable[Module]) -> None:
    """Each top-level name means one thing in all `modules`, since a bundle has one namespace."""
    seen: dict[str, tuple[Module, int, str | None]] = {}
    for module in modules:
        for name, line, source in bindings(module.tree):
            first, first_line, first_source = seen.setdefault(name, (module, line, source))
            if first is not module and (source is None or source != first_source):
                raise module.refuse(line, f"`{name}` means something else in {first.name}:{first_line}: rename one")
            if hasattr(builtins, name):
                raise module.refuse(line, f"`{name}` would hide the builtin from every module of the bundle: rename it")


def bindings(node: ast.AST) -> Iterator[tuple[str, int, str | None]]:
    """(name, line, what was imported or None for a definition) of all names bound in a module's namespace."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        yield node.name, node.lineno, None
    elif isinstance(node, ast.Import):
        for alias in node.names:
            root = alias.name.split(".")[0]
            yield alias.asname or root, node.lineno, alias.name if alias.asname else root
    elif isinstance(node, ast.ImportFrom):
        if not node.level:
            for alias in node.names:
                yield alias.asname or alias.name, node.lineno, f"{node.module}.{alias.name}"
    elif isinstance(node, ast.Name):
        if isinstance(node.ctx, ast.Store) and node.id != "__all__":
            yield node.id, node.lineno, None
    elif not isinstance(node, (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)):
        for child in ast.iter_child_nodes(node):
            yield from bindings(child)


def header(entry: Module) -> str:
    """The docstring of the entry module, and where the file comes from."""
    first = entry.tree.body[0] if entry.tree.body else None
    if not isinstance(first, ast.Expr) or ast.get_docstring(entry.tree) is None:
        raise entry.refuse(1, "the docstring of a bundled pipeline module becomes the header of its file: write one")
    text = "\n".join(entry.lines[first.lineno - 1 : first.end_lineno])
    if not text.endswith('"""'):
        raise entry.refuse(first.lineno, 'a docstring ends in """ and nothing follows it on its line')
    note = f"Generated from {entry.name} by `noiseopt hub build`. Edit the source, not this file."
    return f'{text[:-3].rstrip()}\n\n{note}\n"""'


def hoisted(modules: Iterable[Module]) -> str:
    """The third-party imports of all modules, each once, in the order that ruff and isort give them."""
    plain: set[str] = set()
    named: dict[str, set[str]] = {}
    renamed: set[tuple[str, str]] = set()
    for node in (node for module in modules for node in module.tree.body):
        if isinstance(node, ast.Import):
            plain.update(f"{a.name} as {a.asname}" if a.asname else a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            for alias in node.names:
                if alias.asname:
                    renamed.add((node.module, f"{alias.name} as {alias.asname}"))
                else:
                    named.setdefault(node.module, set()).add(alias.name)
    lines = [(name, 0, f"import {name}") for name in plain]
    lines += [(package, 1, from_import(package, names)) for package, names in named.items()]
    lines += [(package, 1, f"from {package} import {name}") for package, name in renamed]
    sections: dict[int, list[str]] = {}
    for name, _, line in sorted(lines, key=lambda entry: (section(entry[0]), entry[1], entry[0].lower(), entry[2])):
        sections.setdefault(section(name), []).append(line)
    return "\n\n".join("\n".join(lines) for lines in sections.values())


def section(name: str) -> int:
    """0 for `__future__`, 1 for the standard library, 2 for the rest."""
    package = name.split()[0].split(".")[0]
    return 0 if package == "__future__" else 1 if package in sys.stdlib_module_names else 2


def from_import(package: str, names: Iterable[str]) -> str:
    """`from package import names`: constants, classes, functions; one name a line if they do not fit on one."""
    ordered = sorted(names, key=lambda n: (0 if len(n) > 1 and n.isupper() else 1 if n[0].isupper() else 2, n.lower()))
    line = f"from {package} import {', '.join(ordered)}"
    if len(line) <= LINE_LENGTH:
        return line
    return "\n".join([f"from {package} import (", *(f"    {name}," for name in ordered), ")"])


def own_code(module: Module) -> str:
    """The module's source lines without docstring, `__all__` and top-level imports."""
    dropped = dropped_lines(module)
    inside = {n for node in module.tree.body for n in range(node.lineno, (node.end_lineno or 0) + 1)}
    kept: list[str] = []
    for number, line in enumerate(module.lines, start=1):
        surplus_blank = number not in inside and not line and kept[-2:] in ([], ["", ""])
        if number not in dropped and not surplus_blank:
            kept.append(line)
    return "\n".join(kept).strip("\n")


def dropped_lines(module: Module) -> set[int]:
    """Line numbers of docstring, `__all__` and top-level imports, with the comments that stand directly above them."""
    dropped: set[int] = set()
    for index, node in enumerate(module.tree.body):
        if is_dropped(index, node):
            start = node.lineno
            while start > 1 and module.lines[start - 2].startswith("#"):
                start -= 1
            dropped.update(range(start, (node.end_lineno or start) + 1))
    return dropped


def is_dropped(index: int, node: ast.stmt) -> bool:
    """Whether a top-level statement has no place in a part of a bundle."""
    if isinstance(node, ast.Expr):
        return index == 0 and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    targets = node.targets if isinstance(node, ast.Assign) else []
    is_all = any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets)
    return is_all or isinstance(node, (ast.Import, ast.ImportFrom))
