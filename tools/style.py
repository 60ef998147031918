"""Hold the package to its rules of style, and print its figures.

    python tools/style.py              name every place that breaks a rule; status 1 if any does
    python tools/style.py --figures    density of each package as well

The rules are those of CONTRIBUTING.md that a program can hold: functions are verbs, a public class
name means one thing, public names say what they do, results are nouns of the field, one
comprehension a statement, and modules are imported where the layer contract sees them.
"""

from __future__ import annotations

import ast
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1] / "llama2"
LONGEST_FUNCTION, LONGEST_FILE = 60, 450  # lines
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
DOCUMENTED = (ast.Module, ast.ClassDef, *FUNCTIONS)
BLOCKS = (*FUNCTIONS, ast.ClassDef, ast.If, ast.For, ast.While, ast.With, ast.Try, ast.Match)

VERBS_THAT_LOOK_ELSE = {"embed", "feed", "need", "seed", "exceed", "proceed", "bring", "string"}
IRREGULAR = {"kept", "told", "said", "held", "found", "built", "made", "sent", "taken", "given"}
IRREGULAR |= {"drawn", "chosen", "written", "known", "shown", "seen", "learnt", "done", "gone"}
PRONOUNS = {"found", "one", "mine", "told", "said", "kept", "own", "whole", "asked"}
OPENINGS = re.compile(r"(What|Whether|How|Who|Which|Where|In which|Of|That)\b")
SEVERAL_MEANINGS = {"Config"}  # what a verb is configured by, in its own module
OPTIONAL = {"readline"}  # modules that may be absent from a Python, imported by name


@dataclass(frozen=True)
class Fault:
    """A place that breaks a rule."""

    path: Path
    line: int
    rule: str

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT.parent)}:{self.line}: {self.rule}"


def check_file(path: Path, tree: ast.Module) -> Iterator[Fault]:
    """Yield the faults of one module."""
    length = len(path.read_text("utf-8").splitlines())
    if length > LONGEST_FILE:
        yield Fault(path, 1, f"the file has {length} lines, {LONGEST_FILE} at most")

    fields = set(find_fields(tree))
    for node in ast.walk(tree):
        if node in fields:
            continue

        for rule in (*check_definition(node), *check_statement(node)):
            yield Fault(path, getattr(node, "lineno", 1), rule)

    for scope in (tree, *(node for node in tree.body if isinstance(node, ast.ClassDef))):
        yield from check_docstrings(path, scope)


def find_fields(tree: ast.Module) -> Iterator[ast.AST]:
    """Yield the names of fields: they are keys of files as well, and not free."""
    for scope in ast.walk(tree):
        for statement in scope.body if isinstance(scope, ast.ClassDef) else ():
            if isinstance(statement, ast.AnnAssign):
                yield statement.target


def check_definition(node: ast.AST) -> Iterator[str]:
    """Yield the rules that the name or the length of a definition breaks."""
    if not isinstance(node, FUNCTIONS):
        return

    lines = (node.end_lineno or node.lineno) - node.lineno + 1
    if lines > LONGEST_FUNCTION:
        yield f"{node.name} has {lines} lines, {LONGEST_FUNCTION} at most"

    if not node.name.startswith("_") and not is_property(node) and is_participle(node.name):
        yield f"{node.name} is no verb in the imperative"


def check_statement(node: ast.AST) -> Iterator[str]:
    """Yield the rules that one statement breaks."""
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id in PRONOUNS:
        yield f"'{node.id}' names no thing of the field"

    if isinstance(node, ast.stmt) and not isinstance(node, BLOCKS):
        count = sum(isinstance(part, COMPREHENSIONS) for part in ast.walk(node))
        if count > 1:
            yield f"{count} comprehensions in one statement"

    if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
        argument = node.args[0]
        if not (isinstance(argument, ast.Constant) and argument.value in OPTIONAL):
            yield "a module is imported where the layer contract does not see it"


def check_docstrings(path: Path, scope: ast.Module | ast.ClassDef) -> Iterator[Fault]:
    """Yield the public definitions of a scope without a docstring, and openings that ask."""
    if isinstance(scope, ast.ClassDef) and scope.name.startswith("_"):
        return

    for node in scope.body:
        if not isinstance(node, (*FUNCTIONS, ast.ClassDef)):
            continue

        text = ast.get_docstring(node)
        if text is None and not node.name.startswith("_") and not is_overload(node):
            yield Fault(path, node.lineno, f"{node.name} has no docstring")

        if text is not None and OPENINGS.match(text):
            yield Fault(path, node.lineno, f"the docstring of {node.name} begins like a question")


def check_classes(trees: dict[Path, ast.Module]) -> Iterator[Fault]:
    """Yield public classes whose name another public class has."""
    places = defaultdict(list)
    for path, tree in trees.items():
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append((path, node.lineno))

    for name, known in places.items():
        if len(known) > 1 and name not in SEVERAL_MEANINGS:
            for path, line in known:
                yield Fault(path, line, f"{len(known)} classes are called {name}")


def is_participle(name: str) -> bool:
    """Tell by its first word whether a name is a participle: `rounded`, `loading`, `kept`."""
    word = name.split("_")[0]
    if word in VERBS_THAT_LOOK_ELSE:
        return False

    return word in IRREGULAR or (len(word) > 4 and word.endswith(("ed", "ing")))


def is_property(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Tell whether a method is read like a field."""
    names = {ast.unparse(decorator).split(".")[-1] for decorator in node.decorator_list}
    return bool(names & {"property", "cached_property", "setter"})


def is_overload(node: ast.AST) -> bool:
    """Tell whether a definition only states one of several signatures."""
    decorators = getattr(node, "decorator_list", [])
    return any(ast.unparse(decorator).endswith("overload") for decorator in decorators)


def measure(path: Path, tree: ast.Module) -> Counter[str]:
    """Count what the figures are made of, in one module."""
    lines = path.read_text("utf-8").splitlines()
    counts: Counter[str] = Counter()
    written = [line.strip() for line in lines if line.strip()]
    counts["lines"] = len(written)
    counts["characters"] = sum(map(len, written))

    inside = set()
    docstrings = set()
    for node in ast.walk(tree):
        counts["comprehensions"] += isinstance(node, COMPREHENSIONS)
        counts["conditionals"] += isinstance(node, ast.IfExp)
        counts["statements"] += isinstance(node, ast.stmt)
        counts["imports"] += isinstance(node, (ast.Import, ast.ImportFrom))

        if isinstance(node, FUNCTIONS):
            inside.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))

        if isinstance(node, DOCUMENTED):
            docstrings.update(id(part) for part in node.body if is_text(part))

    counts["statements"] -= counts["imports"] + len(docstrings)
    counts["inside"] = len(inside)
    counts["blank"] = sum(not lines[number - 1].strip() for number in inside)
    return counts


def is_text(node: ast.stmt) -> bool:
    """Tell whether a statement is a docstring, of a definition or behind a field."""
    return isinstance(node, ast.Expr) and isinstance(getattr(node.value, "value", None), str)


def print_figures(trees: dict[Path, ast.Module]) -> None:
    """Print one line a package, and one for all: statements without imports and docstrings."""
    packages: dict[str, Counter[str]] = defaultdict(Counter)
    for path, tree in trees.items():
        parts = path.relative_to(ROOT).parts
        packages[parts[0] if len(parts) > 1 else "(top)"] += measure(path, tree)

    print(f"{'':14}{'statements':>11}{'lines':>7}{'chars/line':>12}{'blank':>8}", end="")
    print(f"{'compr./100':>12}{'cond./100':>11}")
    for name, counts in (*packages.items(), ("all", sum(packages.values(), Counter()))):
        lines = counts["lines"]
        print(
            f"{name:14}{counts['statements']:11,}{lines:7,}{counts['characters'] / lines:12.1f}"
            f"{counts['blank'] / max(counts['inside'], 1):8.1%}"
            f"{100 * counts['comprehensions'] / lines:12.1f}"
            f"{100 * counts['conditionals'] / lines:11.1f}"
        )


def main() -> int:
    """Print faults, and figures if they are asked for; the exit status."""
    trees = {path: ast.parse(path.read_text("utf-8")) for path in sorted(ROOT.rglob("*.py"))}
    faults = [fault for path, tree in trees.items() for fault in check_file(path, tree)]
    faults += check_classes(trees)

    if "--figures" in sys.argv[1:]:
        print_figures(trees)

    for fault in faults:
        print(fault)

    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
