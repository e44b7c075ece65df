"""Rules of readability that ruff does not have, over the four packages; run by `make lint`.

    python .ci/readability.py [PATH ...]

* No comprehension inside another one, and none with two `for`.
* At most one comprehension per statement; a generator that `sum`, `any`, `cat` and the like consume does not count.
* Fewer than two calls with five or more positional arguments per 1,000 lines.
* No function over 60 lines, its docstring not counted.
* A public top-level name is defined in one module only.
"""

import ast
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

PACKAGES = ("align", "policies", "rewards", "rollouts")
LONGEST_FUNCTION = 60
POSITIONAL_PER_1000_LINES = 2.0
CONSUMERS = {"sum", "any", "all", "max", "min", "cat", "stack", "join", "next", "tuple", "set", "dict", "sorted"}
"""Calls that reduce a generator to one value: it reads as part of the call."""
ONE_PER_FILE = {"log", "T", "SPEC", "STAGE"}
"""Names that every file of a kind defines for itself."""

COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def main() -> int:
    """Print every offence with its place; the exit status says whether there is one."""
    roots = [Path(argument) for argument in sys.argv[1:]] or [Path(name) for name in PACKAGES]
    files = [file for root in roots for file in ([root] if root.is_file() else sorted(root.rglob("*.py")))]
    trees = {file: ast.parse(file.read_text(encoding="utf-8")) for file in files}
    offences: list[str] = []
    for file, tree in trees.items():
        offences += [f"{file}:{line}: {text}" for line, text in (*comprehensions(tree), *long_functions(tree))]
    if not sys.argv[1:]:
        offences += positional(trees)
        offences += twice_defined(trees)
    print("\n".join(offences) or "readability: nothing to say")
    return int(bool(offences))


def comprehensions(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Nested comprehensions, those with two `for`, and statements with more than one."""
    for node in ast.walk(tree):
        if isinstance(node, COMPREHENSIONS):
            inner = any(isinstance(below, COMPREHENSIONS) and below is not node for below in ast.walk(node))
            if inner:
                yield node.lineno, "a comprehension inside another one"
            if len(node.generators) > 1:
                yield node.lineno, "a comprehension with two `for`"
        if isinstance(node, ast.stmt):
            count = sum(1 for _ in own_comprehensions(node))
            if count > 1:
                yield node.lineno, f"{count} comprehensions in one statement"


def own_comprehensions(statement: ast.stmt) -> Iterator[ast.AST]:
    """Those of a statement's own expressions: not of statements and functions inside it, nor consumed by a call."""
    below = [child for child in ast.iter_child_nodes(statement) if not isinstance(child, ast.stmt)]
    while below:
        node = below.pop()
        children = list(ast.iter_child_nodes(node))
        if isinstance(node, COMPREHENSIONS):
            yield node
        if isinstance(node, ast.Call) and called(node) in CONSUMERS:
            children = [child for child in children if not isinstance(child, ast.GeneratorExp)]
        below += [child for child in children if not isinstance(child, ast.stmt | ast.Lambda)]


def called(call: ast.Call) -> str:
    """The last part of a called name."""
    function = call.func
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


def long_functions(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Functions that are too long to be read at one look."""
    for node in ast.walk(tree):
        if isinstance(node, FUNCTIONS) and node.end_lineno is not None:
            first = node.body[0]
            documented = ast.get_docstring(node) is not None
            docstring = (first.end_lineno or 0) - first.lineno + 1 if documented else 0
            length = node.end_lineno - node.lineno + 1 - docstring
            if length > LONGEST_FUNCTION:
                yield node.lineno, f"{node.name} has {length} lines"


def positional(trees: dict[Path, ast.Module]) -> list[str]:
    """Calls with five or more positional arguments, where there are too many of them."""
    lines = sum(file.read_text(encoding="utf-8").count("\n") for file in trees)
    places: list[str] = []
    for file, tree in trees.items():
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and len(node.args) >= 5]
        places += [
            f"{file}:{call.lineno}: {called(call)} is given {len(call.args)} positional arguments" for call in calls
        ]
    return places if 1000 * len(places) / max(lines, 1) >= POSITIONAL_PER_1000_LINES else []


def twice_defined(trees: dict[Path, ast.Module]) -> list[str]:
    """Public names that two modules define."""
    places: dict[str, set[str]] = defaultdict(set)
    for file, tree in trees.items():
        for node in tree.body:
            for name in defined(node):
                if not name.startswith("_") and name not in ONE_PER_FILE:
                    places[name].add(str(file))
    return [f"{name} is defined in {', '.join(sorted(files))}" for name, files in places.items() if len(files) > 1]


def defined(node: ast.stmt) -> Iterator[str]:
    """The names that a top-level statement defines."""
    if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
        yield node.name
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    for target in targets:
        names = target.elts if isinstance(target, ast.Tuple) else [target]
        yield from (name.id for name in names if isinstance(name, ast.Name))


if __name__ == "__main__":
    sys.exit(main())
