"""The shape of the source: documented, short modules and functions, no leftovers."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MOST_MODULE_LINES = 500
MOST_FUNCTION_LINES = 70
GENERATED = (ROOT / "sdk/lemix/v1", ROOT / "sdk/lemix/internal")
SOURCES = sorted(
    path
    for folder in ("services", "sdk/lemix", "deploy", "bench")
    for path in (ROOT / folder).rglob("*.py")
    if not any(path.is_relative_to(generated) for generated in GENERATED)
)

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def public_definitions(tree):
    """Public classes and functions of a module, and public methods of its public classes."""
    for node in tree.body:
        if isinstance(node, Definition) and not node.name.startswith("_"):
            yield node.name, node
            if isinstance(node, ast.ClassDef):
                for item in node.body:
                    if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef) and not item.name.startswith("_"):
                        yield f"{node.name}.{item.name}", item


TREES = {str(path.relative_to(ROOT)): ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}
TEXTS = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in SOURCES}


def offences(found):
    """Offences by file, files without any left out."""
    return {path: items for path, items in found.items() if items}


def test_there_is_source_to_look_at():
    assert len(SOURCES) > 50


def test_every_module_is_documented():
    # An empty __init__.py has nothing to tell.
    assert [path for path, text in TEXTS.items() if text.strip() and not ast.get_docstring(TREES[path])] == []


def test_everything_public_is_documented():
    """What a method does is told where it is declared: an override of a documented one needs no second text."""
    undocumented = {
        path: [name for name, node in public_definitions(tree) if not ast.get_docstring(node)]
        for path, tree in TREES.items()
    }
    declared = {
        name.rpartition(".")[2]
        for tree in TREES.values()
        for name, node in public_definitions(tree)
        if "." in name and ast.get_docstring(node)
    }
    missing = {
        path: [name for name in names if "." not in name or name.rpartition(".")[2] not in declared]
        for path, names in undocumented.items()
    }
    assert offences(missing) == {}


def test_modules_are_short():
    sizes = {path: len(text.splitlines()) for path, text in TEXTS.items()}
    assert {path: size for path, size in sizes.items() if size > MOST_MODULE_LINES} == {}


def test_functions_are_short():
    long = {
        path: [
            f"{node.name}: {node.end_lineno - node.lineno + 1} lines"
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            and node.end_lineno - node.lineno + 1 > MOST_FUNCTION_LINES
        ]
        for path, tree in TREES.items()
    }
    assert offences(long) == {}


def test_nothing_is_left_unimplemented():
    """Comments that put work off are ruff's to find (FIX)."""
    names = {
        path: [
            node.lineno for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id == "NotImplementedError"
        ]
        for path, tree in TREES.items()
    }
    assert offences(names) == {}


def swallows_everything(node):
    if not isinstance(node, ast.ExceptHandler) or not all(isinstance(statement, ast.Pass) for statement in node.body):
        return False
    return node.type is None or (isinstance(node.type, ast.Name) and node.type.id in ("Exception", "BaseException"))


def test_no_exception_is_swallowed_whole():
    """`except: pass` and `except Exception: pass` hide faults; narrow ones say what they expect."""
    swallowed = {
        path: [node.lineno for node in ast.walk(tree) if swallows_everything(node)] for path, tree in TREES.items()
    }
    assert offences(swallowed) == {}
