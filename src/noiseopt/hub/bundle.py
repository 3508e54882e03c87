"""Join modules of the package, with everything of ours that they import, into one self-contained file.

diffusers' `custom_pipeline=` loads a `pipeline.py` and the files that it imports relatively. It finds those with a
regular expression that misses siblings of siblings in a local folder and fetches a shared sibling once per import from
the Hub. The code behind `pipeline.py` therefore is a single file without relative imports. Source lines are copied,
dependencies first, with their comments and the docstrings of classes and calls; those of other functions stay in the
sources. Code whose meaning would change is refused with file and line.
"""

from __future__ import annotations

import ast
import builtins
import functools
import hashlib
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "noiseopt"
LINE_LENGTH = 120
# diffusers puts the bundle of every local pipeline in the same place, where the next one replaces it in `sys.modules`.
OWN_NAME = """\
# The name that diffusers gives this module may come to mean the bundle of another release.
sys.modules[f"{{__name__}}_{digest}"] = sys.modules[__name__]
__name__ = f"{{__name__}}_{digest}\""""
# Text that diffusers takes for an import of another file, also inside a docstring.
LOOKS_RELATIVE = re.compile(r"^\s*(from\s+\.\S+\s+import|import\s+\.\S+\s*$)")


class Refused(ValueError):
    """The module cannot be bundled; the message starts with `file:line:`."""


@dataclass(frozen=True, eq=False)
class Module:
    """A parsed source file; `name` is its path relative to the package."""

    path: Path
    name: str
    lines: list[str]
    tree: ast.Module

    @classmethod
    def read(cls, path: Path, package: Path) -> Module:
        source = path.read_text(encoding="utf-8")
        name = path.relative_to(package).as_posix()
        return cls(path, name, source.split("\n"), ast.parse(source, str(path)))

    @functools.cached_property
    def imports(self) -> list[ast.Import | ast.ImportFrom]:
        """Every import statement, including those inside functions."""
        return [node for node in ast.walk(self.tree) if isinstance(node, (ast.Import, ast.ImportFrom))]

    def refuse(self, line: int, reason: str) -> Refused:
        return Refused(f"{self.name}:{line}: {reason}")


def bundle(wanted: Iterable[Path], package: Path, docstring: str) -> str:
    """Return the source of one file with the wanted modules and everything of the package that they import.

    Args:
        wanted: Paths below `package`. They may run through its symbolic links; relative imports follow the path as
            written, so the layout is that of the installed package in a checkout too.
        package: The folder of the package.
        docstring: The docstring of the file.

    Raises:
        Refused: For a module that cannot be joined with the others without changing its meaning.
    """
    modules = in_order(wanted, package)
    for module in modules:
        check_text(module)
    check_names(modules)
    imports = hoisted(modules)
    bodies = [f"# {module.name}\n\n{body}" for module in modules if (body := own_code(module))]
    digest = hashlib.sha256("\n".join([imports, *bodies]).encode()).hexdigest()[:12]
    top = f'"""{docstring}"""\n\n{imports}\n\n{OWN_NAME.format(digest=digest)}'
    return "\n\n".join([top, *bodies]) + "\n"


def public_modules(init: Path, package: Path) -> list[Path]:
    """Return the modules that an `__init__.py` imports from."""
    return [target for _, target in dependencies(Module.read(init, package))]


def in_order(wanted: Iterable[Path], package: Path) -> list[Module]:
    """Return the wanted modules and all that they need, dependencies first."""
    done: dict[Path, Module] = {}

    def visit(path: Path, pending: tuple[Path, ...]) -> None:
        module = Module.read(path, package)
        for node, target in dependencies(module):
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


def dependencies(module: Module) -> Iterator[tuple[ast.ImportFrom, Path]]:
    """Yield each relative import with the file that it names."""
    for node in module.imports:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
        relative = isinstance(node, ast.ImportFrom) and node.level > 0
        if not relative and any(name.split(".")[0] == PACKAGE for name in names):
            raise module.refuse(node.lineno, f"`{PACKAGE}` is not installed where a bundle runs: import relatively")
        if any(alias.name == "*" for alias in node.names):
            raise module.refuse(node.lineno, "a starred import hides which names it binds: import them by name")
        if isinstance(node, ast.ImportFrom) and relative:
            yield node, resolve(module, node)


def resolve(module: Module, node: ast.ImportFrom) -> Path:
    """Return the file that a relative import names: a module, never a package."""
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
    """Refuse a top-level name that means two things: a bundle has one namespace."""
    seen: dict[str, tuple[Module, int, str | None]] = {}
    for module in modules:
        for name, line, source in bindings(module.tree):
            first, first_line, first_source = seen.setdefault(name, (module, line, source))
            if first is not module and (source is None or source != first_source):
                raise module.refuse(line, f"`{name}` means something else in {first.name}:{first_line}: rename one")
            if hasattr(builtins, name):
                raise module.refuse(line, f"`{name}` would hide the builtin from every module of the bundle: rename it")


def bindings(node: ast.AST) -> Iterator[tuple[str, int, str | None]]:
    """Yield (name, line, imported object or None for a definition) for each name bound in a module's namespace."""
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


def hoisted(modules: Iterable[Module]) -> str:
    """Return the third-party imports of all modules, each once, sorted as ruff and isort sort them."""
    plain = {"sys"}  # for `OWN_NAME`
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
    lines += [(origin, 1, from_import(origin, names)) for origin, names in named.items()]
    lines += [(origin, 1, f"from {origin} import {name}") for origin, name in renamed]
    sections: dict[int, list[str]] = {}
    for name, _, line in sorted(lines, key=lambda entry: (section(entry[0]), entry[1], entry[0].lower(), entry[2])):
        sections.setdefault(section(name), []).append(line)
    return "\n\n".join("\n".join(lines) for lines in sections.values())


def section(name: str) -> int:
    """Return 0 for `__future__`, 1 for the standard library, 2 for other packages."""
    origin = name.split()[0].split(".")[0]
    return 0 if origin == "__future__" else 1 if origin in sys.stdlib_module_names else 2


def from_import(origin: str, names: Iterable[str]) -> str:
    """Return an import of constants, classes, functions in this order, one per line if they exceed a line."""
    ordered = sorted(names, key=lambda n: (0 if len(n) > 1 and n.isupper() else 1 if n[0].isupper() else 2, n.lower()))
    line = f"from {origin} import {', '.join(ordered)}"
    if len(line) <= LINE_LENGTH:
        return line
    return "\n".join([f"from {origin} import (", *(f"    {name}," for name in ordered), ")"])


def own_code(module: Module) -> str:
    """Return the module's source lines without the dropped lines, docstrings of functions and second blank lines."""
    dropped = dropped_lines(module) | function_docstrings(module.tree)
    inside = {n for node in module.tree.body for n in range(node.lineno, (node.end_lineno or 0) + 1)}
    lines: list[str] = []
    for number, line in enumerate(module.lines, start=1):
        surplus_blank = number not in inside and not line and lines[-1:] in ([], [""])
        if number not in dropped and not surplus_blank:
            lines.append(line)
    return "\n".join(lines).strip("\n")


def function_docstrings(tree: ast.Module) -> set[int]:
    """Return the line numbers of the docstrings of functions and methods that do more than say what they do.

    Those of `__call__` stay, since `help` shows them, and so do those of the mixins.
    """
    mixins = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name.endswith("Mixin")]
    shown = {id(node) for mixin in mixins for node in mixin.body}
    functions = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and len(node.body) > 1)
    hidden = [node for node in functions if node.name != "__call__" and id(node) not in shown]
    documented = [node.body[0] for node in hidden if ast.get_docstring(node) is not None]
    return {line for node in documented for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)}


def dropped_lines(module: Module) -> set[int]:
    """Return the line numbers of docstring, `__all__` and top-level imports, with comments directly above them."""
    dropped: set[int] = set()
    for index, node in enumerate(module.tree.body):
        if is_dropped(index, node):
            start = node.lineno
            while start > 1 and module.lines[start - 2].startswith("#"):
                start -= 1
            dropped.update(range(start, (node.end_lineno or start) + 1))
    return dropped


def is_dropped(index: int, node: ast.stmt) -> bool:
    if isinstance(node, ast.Expr):
        return index == 0 and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    targets = node.targets if isinstance(node, ast.Assign) else []
    is_all = any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets)
    return is_all or isinstance(node, (ast.Import, ast.ImportFrom))
