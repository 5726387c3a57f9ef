"""HumanEval as the scripts of D2F score it: from an answer only what its function needs is run.

The fenced code of the answer is put behind the task's prompt. Of the longest stretch of lines that is Python, imports
and the definitions that the entry point needs are kept, as EvalPlus's sanitizer does. The task's tests then run in the
sandbox.
"""

from __future__ import annotations

import ast
import warnings

from shared.scripts import sandbox

OPENING, CLOSING = "```python\n", "```"


def answered(text: str) -> str:
    """What stands between the first opening fence and the next fence; all of ``text`` where there is no opening one."""
    _, found, rest = text.partition(OPENING)
    return rest.partition(CLOSING)[0] if found else text


def parsed(code: str) -> ast.Module | None:
    """None for what is no Python."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of invalid escapes in strings
        try:
            return ast.parse(code)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return None


def longest_program(code: str) -> ast.Module:
    """Of the longest run of lines that is Python (the first such)."""
    lines = code.splitlines()
    for length in range(len(lines), 0, -1):
        for begin in range(len(lines) - length + 1):
            tree = parsed("\n".join(lines[begin : begin + length]))
            if tree is not None:
                return tree
    return ast.Module([], [])


def defined_by(node: ast.stmt) -> list[str]:
    """The names that a statement defines. One that returns nothing defines none: the prompt's own is a docstring."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return [node.name] if any(isinstance(n, ast.Return) for n in ast.walk(node)) else []
    if isinstance(node, ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return [t.id for t in targets if isinstance(t, ast.Name) and isinstance(node, ast.Assign | ast.AnnAssign)]


def needed(code: str, entry_point: str) -> str:
    """The imports of ``code``, and of every name that ``entry_point`` needs the first definition."""
    body = longest_program(code).body
    definitions: dict[str, ast.stmt] = {}
    for node in body:
        for name in defined_by(node):
            definitions.setdefault(name, node)
    wanted, todo = set(), [entry_point]
    while todo:
        name = todo.pop()
        if name in definitions and name not in wanted:
            wanted.add(name)
            todo += [n.id for n in ast.walk(definitions[name]) if isinstance(n, ast.Name)]
    kept = {id(definitions[name]) for name in wanted}
    return "\n".join(ast.unparse(n) for n in body if isinstance(n, ast.Import | ast.ImportFrom) or id(n) in kept)


def program(doc: dict, text: str) -> str:
    """What is run: the kept definitions, then the tests."""
    kept = needed(f"{doc['prompt']}\n{answered(text)}", doc["entry_point"])
    return f"{kept}\n\n{doc['test']}\ncheck({doc['entry_point']})"


def judge(doc: dict, results: list[str]) -> dict[str, float]:
    """``acc``: do the tests pass?"""
    return {"acc": float(sandbox.run(program(doc, results[0])).passed)}
