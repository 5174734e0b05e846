"""The site: `sphinx-build -W docs build/docs`, with the package installed (its docstrings make api.md)."""

import dataclasses
import inspect
import re

import taylored

project = "taylored"
author = "the authors of taylored"
version = release = taylored.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.intersphinx", "sphinx.ext.viewcode"]
intersphinx_mapping = {}  # nothing is fetched while the site is built
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"taylored {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_copyright = False
html_show_sphinx = False
pygments_style = "friendly"
pygments_dark_style = "monokai"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 88
python_use_unqualified_type_names = True
add_module_names = False

NAME = re.compile(r"[A-Za-z_][\w.]*")
SPAN = re.compile(r"(``.*?``|`[^`]+`)", re.DOTALL)


def arguments(what) -> list[str]:
    """The names of a function's arguments, a class's, or a data class's fields."""
    names = [field.name for field in dataclasses.fields(what)] if dataclasses.is_dataclass(what) else []
    try:
        return names + list(inspect.signature(what).parameters)
    except (TypeError, ValueError):
        return names


def plain(_app, _what, _name, what, _options, lines):
    """Docstrings are plain text with code in backticks: names become links, arguments ("name: what it is") bold, and what is
    special to reStructuredText is not."""
    text = "\n".join(lines)
    if text.startswith(":"):
        return  # a field of a data class, of which Sphinx makes its own
    indented = re.compile(r"\n[ ]{4,}\S")
    named = "|".join(sorted({re.escape(n) for n in arguments(what)}, key=len, reverse=True))
    described = re.compile(rf"(?:^|(?<=[.;,] )|(?<=\n))((?:{named})(?:, (?:{named}))*):(?=\s)") if named else None
    parts = []
    for part in SPAN.split(text):
        if part.startswith("`"):
            code = " ".join(part.strip("`").split())
            parts.append(f":py:obj:`{code}`" if NAME.fullmatch(code) else f"``{code}``")
        else:
            part = re.sub(r"([|*])|(?<=\w)(_)(?!\w)", r"\\\1\2", part)
            parts.append(described.sub(r"**\1**:", part) if described else part)
    text = "".join(parts)
    # A paragraph that ends in a colon before an indented one introduces code.
    blocks = text.split("\n\n")
    for i in range(len(blocks) - 1):
        if blocks[i].rstrip().endswith(":") and indented.match("\n" + blocks[i + 1]):
            blocks[i] = blocks[i].rstrip() + ":"
            blocks[i + 1] = re.sub(r"\\([|*_])", r"\1", blocks[i + 1])
    lines[:] = "\n\n".join(blocks).split("\n")


def setup(app):
    app.connect("autodoc-process-docstring", plain)
    return {"parallel_read_safe": True}
