"""Pipelines that leave: their folder takes along the code that samples, for `DiffusionPipeline.from_pretrained`.

It is this package's own source: of the modules that a pipeline's classes are in, the definitions that they need, one
after the other in a file that imports torch, diffusers and einops (transformers too for a text encoder, or an RAE).
"""

import ast
import builtins
import hashlib
import json
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from vavae_tools.runtime.files import atomic_write, read_json

ROOT, PREFIX = Path(__file__).parents[1], "vavae_tools."
HOMES: dict[str, str] = {}  # in such a file: class → the module of the package that it comes from
HEADER = '''"""The code of this folder's pipeline, made of the source of vavae_tools (MIT License) when it was saved."""
'''
Place = tuple[str, str]  # a module of the package, and a name at its top level


def take_code_along(pipe: DiffusionPipeline, folder: str | Path) -> None:
    """Write the code of a saved pipeline into its folder, and name it in `model_index.json`.

    Of a folder diffusers takes the pipeline's file, what this imports, and a file in the folder of each part. It keeps
    them in one place for all folders, with bytecode by second and size: so names end with a hash of the code.
    """
    folder, kind = Path(folder), type(pipe)
    parts = {name: (_home(type(part)), type(part).__name__) for name, part in pipe.components.items()}
    parts = {name: place for name, place in parts.items() if place[0].startswith(PREFIX)}
    if kind.__module__.startswith(PREFIX):
        code = flat_source((kind.__module__, kind.__name__), *parts.values())
    else:
        code = Path(sys.modules[kind.__module__].__file__).read_text(encoding="utf-8")  # it came from such a file
    digest = hashlib.sha256(code.encode()).hexdigest()[:8]
    module, pipeline = f"vavae_tools_{digest}", f"pipeline_{digest}"
    files = {f"{module}.py": code, f"{pipeline}.py": _looked_for(f".{module}", kind.__name__)}
    index = read_json(folder / "model_index.json")
    index["_class_name"] = [pipeline, kind.__name__]
    for name, (home, part) in parts.items():
        index[name] = ["__".join([*home.split("."), f"{part}_{digest}"]), part]
        files[f"{name}/{index[name][0]}.py"] = _looked_for(f"diffusers_modules.local.{module}", part)
    configs = {"model_index.json": index}
    configs |= {str(path.relative_to(folder)): read_json(path) for path in folder.glob("*/config.json")}
    for name, config in configs.items():
        config.pop("_name_or_path", None)  # a path of this machine
        files[name] = json.dumps(config, indent=2, sort_keys=True) + "\n"
    for name, text in files.items():
        with atomic_write(folder / name) as partial:
            partial.write_text(text, encoding="utf-8")


def as_installed(index: dict[str, Any]) -> dict[str, Any]:
    """Return what a `model_index.json` says, with this package's classes in place of the folder's code."""
    ours = dict(index)
    for name, value in index.items():
        if name == "_class_name" and isinstance(value, list):
            ours[name] = value[-1]
        elif isinstance(value, list) and value and str(value[0]).startswith("vavae_tools__"):
            ours[name] = [".".join(value[0].split("__")[:-1]), *value[1:]]
    return ours


def _home(kind: type) -> str:
    return HOMES.get(kind.__name__, kind.__module__)


def _looked_for(module: str, name: str) -> str:
    return f'"""Where diffusers looks for a class of this folder."""\n\nfrom {module} import {name}  # noqa: F401\n'


# ---- one file of many
@cache
def flat_source(*wanted: Place) -> str:
    """Return the source of these definitions, and of all in the package that they need, as one file."""
    needed, namesakes, todo = set(), set(), list(wanted)
    while todo:
        module, name = place = todo.pop()
        if not name:  # the module itself, of which `module.name` is needed: here it is this file
            namesakes.add(module.rpartition(".")[2])
        elif place not in needed:
            needed.add(place)
            todo += _uses(module, _top_level(module)[name])
    owners, imports, parts = dict.fromkeys(dir(builtins), "Python"), {"import sys"}, []
    owners |= dict.fromkeys(namesakes, "a module")
    for module in _in_order(wanted):
        for statement in dict.fromkeys(_top_level(module).values()):
            names = [name for name in _given(statement) if (module, name) in needed]
            is_import, whose = isinstance(statement, ast.Import | ast.ImportFrom), module
            for name in names:
                if is_import:
                    imports.add(whose := _import_of(statement, name))
                if owners.setdefault(name, whose) != whose:
                    raise ValueError(f"Two things are called {name}, of {owners[name]} and {whose}: rename one")
            if names and not is_import:
                parts.append(_text(module, statement))
    imports = "\n".join(sorted(imports, key=lambda line: (line.startswith("from"), line)))
    places = f"{' = '.join(sorted(namesakes))} = sys.modules[__name__]"
    homes = f"HOMES.update({ ({name: module for module, name in sorted(wanted)}) })"
    return "\n\n\n".join([HEADER + imports, places, *parts, homes]) + "\n"


@cache
def _read(module: str) -> tuple[list[str], ast.Module]:
    path = ROOT.parent.joinpath(*module.split("."))
    text = (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text(encoding="utf-8")
    return text.splitlines(), ast.parse(text)


@cache
def _top_level(module: str) -> dict[str, ast.stmt]:
    """Return each name at a module's top level → the statement that gives it."""
    return {name: statement for statement in _read(module)[1].body for name in _given(statement)}


def _given(statement: ast.stmt) -> list[str]:
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        return [statement.name]
    if isinstance(statement, ast.Import | ast.ImportFrom):
        return [alias.asname or alias.name.partition(".")[0] for alias in statement.names]
    targets = getattr(statement, "targets", [statement.target] if isinstance(statement, ast.AnnAssign) else [])
    return [node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)]


def _inside(statement: ast.AST, name: str) -> Place | None:
    """Return where an import from the package takes a name; of a module, itself and ""."""
    if not isinstance(statement, ast.ImportFrom) or not f"{statement.module}.".startswith(PREFIX):
        return None
    path = ROOT.parent.joinpath(*statement.module.split("."), name)
    return (f"{statement.module}.{name}", "") if path.with_suffix(".py").is_file() else (statement.module, name)


def _uses(module: str, statement: ast.stmt) -> Iterator[Place]:
    """Yield what of its module and of the package a statement names, an import in it too."""
    known = {name: node for node in ast.walk(statement) if _inside(node, "") for name in _given(node)}
    known = _top_level(module) | known
    if isinstance(statement, ast.Import | ast.ImportFrom):
        yield from filter(None, (_inside(statement, name) for name in _given(statement)))
        return
    for node in ast.walk(statement):
        if isinstance(node, ast.Name) and node.id in known:
            yield _inside(known[node.id], node.id) or (module, node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in known:
            of, name = _inside(known[node.value.id], node.value.id) or ("", "not a module")
            if not name and node.attr in _top_level(of):
                yield of, node.attr


def _in_order(wanted: tuple[Place, ...]) -> dict[str, None]:
    """Return the modules that are imported, each after those that it imports itself."""
    order: dict[str, None] = {}

    def visit(module: str) -> None:
        if module not in order:
            for statement in _read(module)[1].body:
                for of, _ in filter(None, (_inside(statement, name) for name in _given(statement))):
                    visit(of)
            order.setdefault(module)

    for module, _ in wanted:
        visit(module)
    return order


def _import_of(statement: ast.Import | ast.ImportFrom, name: str) -> str:
    taken = next(alias for alias in statement.names if name == (alias.asname or alias.name.partition(".")[0]))
    return ast.unparse(type(statement)(**{**vars(statement), "names": [taken]}))


def _text(module: str, statement: ast.stmt) -> str:
    """Return a statement as it stands in its module, with the comment above; what it imports is in the same file."""
    lines = list(_read(module)[0])
    for node in ast.walk(statement):
        if _inside(node, ""):
            lines[node.lineno - 1 : node.end_lineno] = [" " * node.col_offset + "pass"] * (
                node.end_lineno - node.lineno + 1
            )
    first = min([statement.lineno, *(one.lineno for one in getattr(statement, "decorator_list", []))]) - 1
    while lines[first - 1].startswith("# ") and not lines[first - 1].startswith("# ----"):
        first -= 1
    return "\n".join(lines[first : statement.end_lineno])
