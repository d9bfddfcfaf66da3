"""Writes the API reference, as HTML, from the docstrings: `python docs/reference.py [FOLDER]` (default: build/api).

pdoc does the work. What it does not know is our form of a docstring, which is that of Hugging Face: sections whose
items are "name (`type`): text", and references such as [`FaceEmbedder`] or [`~faces.FaceEmbedder.embed`]. A warning of
pdoc's, and a reference to something that is not there, are errors.
"""

import inspect
import pkgutil
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent, indent
from typing import Any, get_type_hints

import pdoc
import pdoc.doc
import pdoc.render
from jinja2 import pass_context
from torch import nn

import adaptface

SHIPPED = ["configuration_adaptface", "modeling_adaptface", "image_processing_adaptface"]
LEFT_OUT = ("adaptface.cli", "adaptface.clean_load")  # `adaptface --help` tells; a script that is run by path

_SECTION = re.compile(
    r"^(?P<title>Args|Attributes|Returns|Yields|Raises):\n(?P<body>(?:[ \t]+\S.*\n?|\n(?=[ \t]+\S))+)"
    r"|^(?P<source>Sources?): (?P<text>(?:.*\S.*\n?)+)",
    re.MULTILINE,
)
_ITEM = re.compile(r"(?P<name>[\w*]+(?:, [\w*]+)*)(?: \((?P<type>.+?)\))?:\s(?P<text>.*)", re.DOTALL)
_REFERENCE = re.compile(r"\[`~?([\w.]+)`\]")


def markdown(docstring: str) -> str:
    """A docstring's sections as Markdown: a title, and of arguments and errors a list."""

    def section(found: re.Match[str]) -> str:
        if found["source"]:
            return f"\n###### {found['source']}\n\n{' '.join(found['text'].split())}\n\n"
        body = dedent(found["body"]).strip()
        if found["title"] not in ("Returns", "Yields"):
            body = "\n".join(_item(item) for item in re.split(r"\n(?=\S)", body))
        return f"\n###### {found['title']}\n\n{body}\n\n"

    return _SECTION.sub(section, docstring)


def _item(text: str) -> str:
    """One argument or error as an item of a list; words that name neither stand as they are."""
    found = _ITEM.fullmatch(text)
    if found is None:
        return f"- {text}"
    of_type = f" ({found['type']})" if found["type"] else ""
    return f"- **`{found['name']}`**{of_type}: " + indent(dedent(found["text"]).strip(), "  ").lstrip()


def module_names() -> list[str]:
    """The modules that the reference describes."""
    found = [module.name for module in pkgutil.walk_packages(adaptface.__path__, "adaptface.")]
    return [*SHIPPED, "adaptface", *(name for name in found if not name.startswith(LEFT_OUT))]


def full_names(modules: dict[str, pdoc.doc.Module]) -> Iterator[str]:
    """Of everything that the reference describes, where it is defined."""
    for name, module in modules.items():
        yield name
        members = [*module.members.values()]
        while members:
            member = members.pop()
            if isinstance(member, pdoc.doc.Module) or member.taken_from[0] not in modules:
                continue
            yield ".".join(member.taken_from)
            if isinstance(member, pdoc.doc.Class):
                members += member.own_members


def resolve_named_tuples(module: Any) -> None:
    """Give the constructors of a module's named tuples their types; as texts they cannot be looked up."""
    for value in vars(module).values():
        if isinstance(value, type) and issubclass(value, tuple) and value.__module__ == module.__name__:
            value.__new__.__annotations__ |= get_type_hints(value)


def resolved(reference: str, module: str, names: set[str]) -> str:
    """The full name of what a docstring in `module` refers to.

    Raises:
        ValueError: there is no such thing, or more than one.
    """
    if f"{module}.{reference}" in names:
        return f"{module}.{reference}"
    found = [name for name in names if name == reference or name.endswith(f".{reference}")]
    near = [name for name in found if name.startswith(f"{module}.")]
    if len(near or found) != 1:
        raise ValueError(f"{module}: [`{reference}`] refers to {sorted(found) or 'nothing'}; write it in full")
    return (near or found)[0]


def build(folder: Path) -> None:
    """Write the pages.

    Raises:
        ValueError: a reference leads nowhere.
        UserWarning: pdoc cannot show something.
    """
    for name in adaptface.__all__:  # imported when they are asked for, and pdoc does not ask
        setattr(adaptface, name, getattr(adaptface, name))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module="pdoc")
        modules = {name: pdoc.doc.Module.from_name(name) for name in module_names()}
        for module in modules.values():
            resolve_named_tuples(module.obj)
        names = set(full_names(modules))

        @pass_context
        def to_markdown(context: Any, docstring: str) -> str:
            if docstring == inspect.getdoc(nn.Module.__init__):  # pdoc's choice where we have none
                return ""
            module = context["module"].modulename
            return _REFERENCE.sub(lambda found: f"`{resolved(found[1], module, names)}`", markdown(docstring))

        pdoc.render.configure(docformat="markdown", footer_text=f"AdaptFace {adaptface.__version__}")
        pdoc.render.env.filters["to_markdown"] = to_markdown
        # A package brings its modules along, but for one with `__all__`.
        named = [name for name in modules if not name.startswith("adaptface.data.")]
        pdoc.pdoc(*named, output_directory=folder)


if __name__ == "__main__":
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "build/api")
    build(target)
    print(f"API reference: {target / 'index.html'}")
