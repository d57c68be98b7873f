"""Make the reference in `docs/reference` from signatures and docstrings: one page per room, what its `__all__` names.

python docs/build_reference.py [FOLDER]
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import sys
import textwrap
import typing
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec

import posttrain
from posttrain.core import Recipe
from posttrain.recipes import BUILT_IN

OUT = Path(__file__).parent / "reference"
ROOMS = sorted(path.parent.name for path in Path(posttrain.__file__).parent.glob("*/__init__.py"))
SECTIONS = ("Args", "Returns", "Raises", "Yields", "Source", "Attributes")
WIDTH = 100


def build(folder: Path = OUT) -> list[Path]:
    """Write every page anew; pages of rooms that are gone are removed.

    Returns:
        The pages, the index first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("*.md"):
        stale.unlink()
    pages = {"README": index()} | {room: page_of(room) for room in ROOMS}
    written = []
    for name, text in pages.items():
        path = folder / f"{name}.md"
        text = re.sub(r" at 0x[0-9a-f]+", "", text)  # of functions in constants: another one on every run
        path.write_text(text.strip() + "\n", encoding="utf-8")
        written.append(path)
    return written


def index() -> str:
    """The list of rooms."""
    rows = [f"| [`{room}`]({room}.md) | {first_line(_module(room)).partition(': ')[2]} |" for room in ROOMS]
    return "\n".join(["# Reference", "", "Made by `make docs` from docstrings.", "", "| room | |", "|---|---|", *rows])


def page_of(room: str) -> str:
    """One room: its door's docstring, then what it gives, classes after functions and constants."""
    module = _module(room)
    names = sorted(module.__all__, key=lambda name: (_rank(getattr(module, name)), name))
    parts = [f"# posttrain.{room}", prose(inspect.getdoc(module) or "")]
    parts += [entry(name, getattr(module, name)) for name in names]
    if room == "recipes":
        parts += [recipe_entry(name) for name in BUILT_IN]
    return "\n\n".join(part for part in parts if part)


def _module(room: str) -> ModuleType:
    return importlib.import_module(f"posttrain.{room}")


def _rank(value: object) -> int:
    return 2 if inspect.isclass(value) else 0 if inspect.isroutine(value) else 1


def entry(name: str, value: object) -> str:
    """One public name."""
    if inspect.isclass(value):
        return class_entry(name, value)
    if inspect.isroutine(value):
        return f"## {name}\n\n{code(signature(name, value))}\n\n{prose(inspect.getdoc(value) or '')}"
    shown = textwrap.shorten(str(value) if typing.get_origin(value) else repr(value), 160, placeholder=" …")
    return f"## {name}\n\n{code(f'{name} = {shown}')}"


def class_entry(name: str, kind: type) -> str:
    """A class: a record's fields as a table, another's constructor; then its public methods."""
    own = inspect.getdoc(kind) if kind.__doc__ and not _inherited_doc(kind) else ""
    parts = [f"## {name}"]
    if issubclass(kind, msgspec.Struct):
        parts += [prose(own or ""), fields_table(kind)]
    elif issubclass(kind, Enum):
        parts += [prose(own or ""), members_table(kind)]
    else:
        if "__init__" in vars(kind) and not getattr(kind, "_is_protocol", False):
            parts.append(code(signature(name, kind)))
        init = vars(kind).get("__init__")
        parts += [prose(own or ""), prose(inspect.getdoc(init) or "") if inspect.isfunction(init) else ""]
    parts += [
        f"### {name}.{title}\n\n{code(shown)}\n\n{prose(inspect.getdoc(member) or '')}"
        for title, member, shown in methods_of(kind)
    ]
    return "\n\n".join(part for part in parts if part)


def _inherited_doc(kind: type) -> bool:
    return any(kind.__doc__ == parent.__doc__ for parent in kind.__mro__[1:])


def methods_of(kind: type) -> Iterator[tuple[str, Any, str]]:
    """Public methods and properties that the class itself documents, in the order of its source, with what to write."""
    for title, member in vars(kind).items():
        plain = member.__func__ if isinstance(member, classmethod | staticmethod) else member
        got = plain.fget if isinstance(plain, property) else plain
        if title.startswith("_") or not inspect.isfunction(got) or not got.__doc__:
            continue
        if got is plain:
            yield title, got, signature(title, got)
        else:
            yield title, got, f"{title}: {_annotation(inspect.signature(got).return_annotation)}"


def fields_table(kind: type[msgspec.Struct]) -> str:
    """Fields with type, default, and what the source says of them: a `doc(…)` or the comment on their line."""
    rows = []
    comments = {name: text for parent in reversed(kind.__mro__) for name, text in comments_of(parent).items()}
    for field in msgspec.structs.fields(kind):
        annotation, said = field.type, comments.get(field.encode_name, "")
        if typing.get_origin(annotation) is typing.Annotated:
            annotation, *notes = typing.get_args(annotation)
            said = " ".join(note.description for note in notes if getattr(note, "description", None)) or said
        default = "required" if field.required else f"`{default_of(field)}`"
        rows.append(f"| `{field.name}` | `{type_name(annotation)}` | {default} | {said} |".replace("`|`", "` `"))
    return "\n".join(["| field | type | default | |", "|---|---|---|---|", *rows]) if rows else ""


def default_of(field: Any) -> str:
    """A field's default, as one would write it."""
    if field.default is not msgspec.NODEFAULT:
        return str(field.default.value) if isinstance(field.default, Enum) else repr(field.default)
    made = field.default_factory()
    return repr(made) if not made or isinstance(made, list | dict | tuple) else f"{type(made).__name__}()"


def comments_of(kind: type) -> dict[str, str]:
    """The comment at the end of each annotated field's last line."""
    try:
        source = textwrap.dedent(inspect.getsource(kind))
    except (OSError, TypeError):
        return {}
    lines = source.splitlines()
    found = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            end = lines[(node.end_lineno or node.lineno) - 1][node.end_col_offset or 0 :]
            if end.strip().startswith("#"):
                found[node.target.id] = end.strip().lstrip("# ")
    return found


def members_table(kind: type[Enum]) -> str:
    """An enumeration's values with the comments on their lines."""
    source = inspect.getsource(kind)
    said = dict(re.findall(r"^\s+(\w+) = [^#\n]*# (.*)$", source, re.MULTILINE))
    rows = [f"| `{member.name}` | `{member.value}` | {said.get(member.name, '')} |" for member in kind]
    return "\n".join(["| member | value | |", "|---|---|---|", *rows])


def type_name(annotation: Any) -> str:
    """A type as one writes it, without its modules; `or` for the bar, which would end a cell of a table."""
    text = annotation.__name__ if inspect.isclass(annotation) and not typing.get_args(annotation) else str(annotation)
    return re.sub(r"\b(?:\w+\.)+(?=\w)", "", text).replace(" | ", " or ").replace("NoneType", "None")


def signature(name: str, function: Any) -> str:
    """`name(…) -> …`, on several lines where one is too long."""
    try:
        found = inspect.signature(function)
    except (TypeError, ValueError):
        return name
    parameters = [each for each in found.parameters.values() if each.name not in ("self", "cls")]
    pieces = _with_stars(parameters, [_parameter(each) for each in parameters])
    returns = "" if found.return_annotation is found.empty else f" -> {_annotation(found.return_annotation)}"
    prefix = "async " if inspect.iscoroutinefunction(function) else ""
    line = f"{prefix}{name}({', '.join(pieces)}){returns}"
    if len(line) <= WIDTH:
        return line
    return f"{prefix}{name}(\n" + "".join(f"    {piece},\n" for piece in pieces) + f"){returns}"


def _parameter(parameter: inspect.Parameter) -> str:
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
    text = stars + parameter.name
    typed = parameter.annotation is not parameter.empty
    if typed:
        text += f": {_annotation(parameter.annotation)}"
    if parameter.default is not parameter.empty:
        value = parameter.default
        default = value.__name__ if inspect.isroutine(value) else textwrap.shorten(repr(value), 60, placeholder=" …")
        text += f" = {default}" if typed else f"={default}"
    return text


def _annotation(note: Any) -> str:
    return note if isinstance(note, str) else type_name(note).replace(" or ", " | ")


def _with_stars(parameters: list[inspect.Parameter], pieces: list[str]) -> list[str]:
    """The bare `*` before the first keyword-only parameter."""
    kinds = [each.kind for each in parameters]
    if inspect.Parameter.VAR_POSITIONAL in kinds or inspect.Parameter.KEYWORD_ONLY not in kinds:
        return pieces
    first = kinds.index(inspect.Parameter.KEYWORD_ONLY)
    return [*pieces[:first], "*", *pieces[first:]]


def recipe_entry(name: str) -> str:
    """A built-in recipe with its options."""
    module, _ = BUILT_IN[name]
    recipe: Recipe[..., Any] = getattr(importlib.import_module(module), name)
    rows = [
        f"| `{option.flag}` | {'required' if option.required else f'`{option.default}`'} | {option.doc} |"
        for option in recipe.options
    ]
    said = prose(re.split(r"\n\s*Args:", inspect.getdoc(recipe.function) or "")[0])
    table = "\n".join(["| option | default | |", "|---|---|---|", *rows])
    return f"## posttrain run {name}\n\n{said}\n\n{table}"


def prose(docstring: str) -> str:
    """A docstring as Markdown: its sections as lists, indented passages as code."""
    done: list[str] = []
    section = ""
    for block in re.split(r"\n\s*\n", docstring.strip()):
        head = re.match(rf"({'|'.join(SECTIONS)}):(?:\n|[ ]|$)", block)
        if head and (head[1] != "Source" or "\n" in block):
            section = head[1]
            done.append(f"**{section}**\n\n{bullets(block[head.end() :], section)}")
        elif block.startswith("    ") and section in ("Args", "Raises"):
            done.append(bullets(block, section))
        elif block.startswith("    ") or re.search(r"^\s{2,}\S", block, re.MULTILINE) or block.startswith("|"):
            done.append(block if block.startswith("|") else code(textwrap.dedent(block)))
        else:
            section = ""
            done.append(block)
    return "\n\n".join(done)


def bullets(body: str, section: str) -> str:
    """`name: what it is` lines as a list; of other sections the text."""
    lines = textwrap.dedent(body).strip("\n").splitlines()
    if section not in ("Args", "Raises", "Attributes"):
        return " ".join(line.strip() for line in lines)
    items: list[str] = []
    for line in lines:
        named = re.match(r"(\*{0,2}[\w.]+(?:, \*{0,2}\w+)*): (.*)", line)
        if named:
            items.append(f"- `{named[1].replace(', ', '`, `')}`: {named[2]}")
        elif items:
            items[-1] += f" {line.strip()}"
        else:
            items.append(line.strip())
    return "\n".join(items)


def first_line(value: object) -> str:
    """The first line of a docstring."""
    return (inspect.getdoc(value) or "").partition("\n")[0]


def code(text: str) -> str:
    """A block of Python."""
    return f"```python\n{text}\n```"


if __name__ == "__main__":
    pages = build(Path(sys.argv[1])) if len(sys.argv) > 1 else build()
    print(f"{len(pages)} pages in {pages[0].parent.name}/")
