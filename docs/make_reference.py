"""Writes docs/api.md from docstrings, and docs/troubleshooting.md from the sentences that errors say.

    python docs/make_reference.py

A test says so where a page is no longer what this writes.
"""

from __future__ import annotations

import ast
import builtins
import inspect
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("predictors", "data_collection", "train", "runtime", "predict_train")
CAUGHT = {"OverflowingExpertError", "RefusedError"}
"""Errors that are caught, and said in other words, before a user meets them. So are Python's own, but for those that settings raise."""


def api() -> str:
    """The page of the Python interface."""
    from predict_train.predictors.checkpoint import Predictors
    from predict_train.runtime.engine import Counters
    from predict_train.runtime.observer import Observer
    from predict_train.runtime.offload import ExpertOffload
    from predict_train.runtime.settings import LoadConfig, OffloadConfig

    from predict_train import load_experts, load_offloaded, load_predictors, offload_experts, offloaded

    functions = (load_offloaded, offload_experts, offloaded, load_experts, load_predictors)
    parts = ["# The Python interface\n\nMade from docstrings by `python docs/make_reference.py`.\n"]
    parts += ["```python\nfrom predict_train import " + ", ".join(f.__name__ for f in functions) + "\n```\n"]
    parts += [_function(function.__name__, function) for function in functions]
    for kind in (OffloadConfig, LoadConfig):
        inherited = set() if kind is OffloadConfig else set(OffloadConfig.model_fields)
        parts.append(f"## `{kind.__name__}`\n\n{inspect.getdoc(kind)}\n")
        if inherited:
            parts.append("All fields of `OffloadConfig`, and:\n")
        for name, field in kind.model_fields.items():
            if name not in inherited:
                default = f" (default: `{field.default}`)" if field.default is not None else ""
                parts.append(f"- **`{name}`**{default}: {_one_line(field.description or '')}")
        parts.append("")
    parts.append("## `model.expert_offload`\n\n" + f"{inspect.getdoc(ExpertOffload)}\n")
    for name, member in vars(ExpertOffload).items():
        if not name.startswith("_"):
            text = _one_line(inspect.getdoc(member) or "")
            parts.append(f"- **`{name}{'' if isinstance(member, property) else '()'}`**: {text}")
    parts.append(f"\n## `Counters`\n\n{inspect.getdoc(Counters)}\n")
    parts += [f"- **`{name}`**: {_one_line(text)}" for name, text in _attributes(Counters)]
    parts.append(f"\n## `Observer`\n\n{inspect.getdoc(Observer)}\n")
    parts += [
        f"- **`{name}{inspect.signature(member)}`**: {_one_line(inspect.getdoc(member) or '')}"
        for name, member in vars(Observer).items()
        if inspect.isfunction(member)
    ]
    parts.append(f"\n## `Predictors`\n\n{inspect.getdoc(Predictors)}\n")
    return "\n".join(parts)


def _function(name: str, function: Any) -> str:
    parameters = ", ".join(inspect.signature(function).parameters)
    return f"## `{name}({parameters})`\n\n{inspect.getdoc(function)}\n"


def _attributes(kind: type) -> Iterator[tuple[str, str]]:
    """The fields of a class with the strings under them."""
    [body] = [node.body for node in ast.parse(inspect.getsource(kind)).body if isinstance(node, ast.ClassDef)]
    for field, text in pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            yield ast.unparse(field.target), str(text.value.value)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def troubleshooting() -> str:
    """The page of all sentences with which a command or a function refuses something."""
    lines = [
        "# What a message means",
        "",
        "Every sentence that an error says, in alphabetical order; `…` stands for a name, a number or a path. Search the page for words of "
        "yours. A sentence says what is wrong and, after a semicolon, what to do. A command then ends with exit code 2, and has written "
        "nothing that is half done. The right column tells where it is said, for who wants to read why. Made from the sources by "
        "`python docs/make_reference.py`.",
        "",
        "| message | said in |",
        "| --- | --- |",
    ]
    found = {sentence: place for room in ROOMS for sentence, place in _sentences(ROOT / room)}
    for sentence in sorted(found, key=lambda s: s.lstrip("… ").lower()):
        shown = sentence.replace("|", "\\|").replace("<", "&lt;")
        lines.append(f"| {shown} | `{found[sentence]}` |")
    return "\n".join(lines) + "\n"


def _sentences(room: Path) -> Iterator[tuple[str, str]]:
    """The sentences of errors that are raised in a room, with the files that raise them."""
    for file in sorted(room.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and node.args and isinstance(node.func, ast.Name)):
                continue
            kind = node.func.id
            is_met = not hasattr(builtins, kind) or (kind == "ValueError" and file.name == "settings.py")
            if kind.endswith("Error") and kind not in CAUGHT and is_met:
                sentence = _one_line(_text(node.args[0]))
                if len(sentence.replace("…", "").split()) > 3:
                    yield sentence, str(file.relative_to(ROOT))


def _text(node: ast.expr) -> str:
    """The text of a literal, with `…` in the place of what is filled in. Of two possible texts, the first."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=values):
            return "".join(_text(value) if isinstance(value, ast.Constant) else "…" for value in values)
        case ast.BinOp(op=ast.Add(), left=left, right=right):
            return _text(left) + _text(right)
        case ast.IfExp(body=body):
            return _text(body)
    return "…"


PAGES = {"api.md": api, "troubleshooting.md": troubleshooting}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (ROOT / "docs" / name).write_text(page(), encoding="utf-8")
