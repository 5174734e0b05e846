"""The package is a line of rooms, each of which knows only those before it; `python tests/test_architecture.py` prints who knows whom."""

import ast
import importlib
import inspect
import pkgutil
import re
import typing
from pathlib import Path

import pytest

import taylored

ROOT = Path(taylored.__file__).parent
# Each imports only from those above it.
LINE = [
    "_library",
    "_errors",
    "_tables",
    "_values",
    "_torch_compat",
    "_files",
    "ops",
    "_gate",
    "_modules",
    "_graph",
    "_graph.values",
    "_graph.labels",
    "_graph.shapes",
    "_graph.numbers",
    "_graph.moves",
    "_graph.rules",
    "_graph.mode",
    "_graph.rows",
    "_graph.follow",
    "_graph.tracer",
    "_graph.components",
    "_graph.rehearsal",
    "_graph.bundles",
    "_graph.tracing",
    "_plan",
    "_planning",
    "_masking",
    "_score",
    "_optimizers",
    "_moments",
    "_residual",
    "_mend",
    "_proof",
    "_compact",
    "_recalibrate",
    "_shrink",
    "_checkpoint",
    "_export",
    "_oracle",
    "_oracle.program",
    "_oracle.exact",
    "_oracle.difference",
    "_oracle.journal",
    "_oracle.measure",
    "criteria",
    "_prune",
    "__init__",
    "_cli",
    "_cli.data",
    "_cli.zoo",
    "_cli.latency",
    "_cli.report",
    "_cli.log",
    "_cli.job",
    "_cli.prune",
    "_cli.rank",
    "_cli.shrink",
    "_cli.export",
    "_cli.options",
    "_cli.main",
    "__main__",
]
MOST_LINES = 500


def rooms() -> dict[str, Path]:
    """Module name below the package -> its file."""
    found = {}
    for path in ROOT.rglob("*.py"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        found[name.removesuffix(".__init__") if name != "__init__" else name] = path
    return found


def imports() -> dict[str, dict[str, list[str]]]:
    """Room -> the rooms that it imports -> the names that it takes from each."""
    known, found = rooms(), {}
    for room, path in known.items():
        taken: dict[str, list[str]] = {}
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "taylored":
                module = node.module.partition(".")[2]
                for alias in node.names:
                    inside = f"{module}.{alias.name}".lstrip(".")
                    target = inside if inside in known else module or "__init__"
                    taken.setdefault(target, []).append("" if inside in known else alias.name)
            elif isinstance(node, ast.Import) and any(alias.name == "taylored" for alias in node.names):
                taken.setdefault("__init__", [])
        found[room] = taken
    return found


def test_every_room_knows_only_those_before_it():
    place = {room: number for number, room in enumerate(LINE)}
    assert rooms().keys() == place.keys()
    assert not [(room, other) for room, taken in imports().items() for other in taken if place[other] >= place[room]]


def test_no_room_is_larger_than_can_be_read_at_once():
    lines = {room: len(path.read_text().splitlines()) for room, path in rooms().items()}
    assert not {room: count for room, count in lines.items() if count > MOST_LINES}


def test_what_is_private_to_torch_has_one_room():
    private = re.compile(
        r"torch(\.\w+)*\._[a-z]|torch\.utils\._|_dynamo|\._schema\b|\._orig_mod|nn\.modules\.\w+\._|\._parameters\b|\._buffers\b"
    )
    code = {
        room: re.sub(r'"""[\s\S]*?"""|#.*', "", path.read_text()) for room, path in rooms().items() if room != "_torch_compat"
    }
    assert not {room: found.group() for room, text in code.items() if (found := private.search(text))}


def test_what_is_public_is_what_the_package_names():
    public = {info.name for info in pkgutil.iter_modules([str(ROOT)]) if not info.name.startswith("_")}
    assert public == {"criteria", "ops"} and public <= set(taylored.__all__)
    for name in taylored.__all__:
        if name not in public:  # no function hides a module of its name
            with pytest.raises(ModuleNotFoundError):
                importlib.import_module(f"taylored.{name}")


def public_functions():
    """Every function and method that a user calls."""
    surface = {f"taylored.{name}": getattr(taylored, name) for name in taylored.__all__}
    for module in (taylored.ops, taylored.criteria):
        mine = {name: value for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__}
        surface |= {f"{module.__name__}.{name}": value for name, value in mine.items() if not name.startswith("_")}
    for name, value in surface.items():
        if inspect.isclass(value) and not issubclass(value, Exception):
            for key, method in vars(value).items():
                method = method.fget if isinstance(method, property) else getattr(method, "__func__", method)
                if not key.startswith("_") and inspect.isfunction(method):
                    yield f"{name}.{key}", method
        elif inspect.isfunction(value):
            yield name, value


@pytest.mark.parametrize(("name", "function"), public_functions(), ids=lambda value: value if isinstance(value, str) else "")
def test_what_is_public_is_typed_and_explained(name, function):
    assert function.__doc__, name
    signature, hints = inspect.signature(function), typing.get_type_hints(function)
    own = [p for p in signature.parameters if p not in ("self", "cls")]
    assert "return" in hints and not [p for p in own if p not in hints], name


def table() -> str:
    """Who imports what from whom."""
    found, lines = imports(), []
    for room in LINE:
        by = sorted((other for other, taken in found.items() if room in taken), key=LINE.index)
        lines.append(f"{room}: {len(rooms()[room].read_text().splitlines())} lines, {len(by)} importers")
        lines += [f"    {other}: {', '.join(name for name in found[other][room] if name) or 'the module'}" for other in by]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
