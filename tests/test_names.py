"""One name for one thing: no two packages define the same name."""

import ast
from collections import defaultdict

from tests.test_imports import MAY_USE, python_files

ALLOWED = {
    "main": "the entry point of each program",
    "parse": "each program parses its own command line",
    "log": "each module has its own logger",
    "train": "the training loop of each program and benchmark",
    "assemble": "each training builds its run",
    "train_step": "each training has its step",
    "finish": "the last stage of each program",
    "CLASSES": "each sample set has its own classes",
    "T": "a type variable",
    "__all__": "lists what a module exports",
}
"""Names that several packages may define, and why."""


def _definitions(tree: ast.Module) -> set[str]:
    """Names of a module's classes, functions and constants.

    A private function or constant matters only in its module, so names such as ``_check`` and ``_ROWS`` may
    recur. With the same parameters or the same value they are the same thing written twice; here these are
    part of the name.
    """
    found = set()
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.FunctionDef):
            found.add(f"{node.name}({ast.unparse(node.args)})" if node.name.startswith("_") else node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                for part in ast.walk(target):
                    if isinstance(part, ast.Name):
                        private = part.id.startswith("_") and part.id not in ALLOWED
                        found.add(f"{part.id} = {ast.unparse(node.value)}" if private else part.id)
    return found - ALLOWED.keys()


def test_no_name_is_defined_in_two_packages() -> None:
    packages: dict[str, set[str]] = defaultdict(set)
    files: dict[str, list[str]] = defaultdict(list)
    for package in MAY_USE:
        for file in python_files(package):
            for name in _definitions(ast.parse(file.read_text())):
                packages[name].add(package)
                files[name].append(f"{package}/{file.name}")
    repeated = [f"{name}: {', '.join(files[name])}" for name in sorted(files) if len(packages[name]) > 1]
    assert not repeated, "rename, merge, or give a reason in ALLOWED:\n" + "\n".join(repeated)
