"""Builds and loads the test modules of tests/simt: kernels on the CPU, under its execution model of CUDA."""

import fcntl
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
import pytest

SIMT = Path(__file__).parent / "simt"
BUILD = SIMT.parent.parent / "build/simt" / sys.implementation.cache_tag
SCHEDULES = ("ascending", "reverse", "random", "ahead", "behind")
# A virtual environment's own programs (cmake, ninja) need not be on the PATH.
PATH = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])


def unsupported():
    """Why the modules cannot be built here, or None."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return f"simt switches stacks on x86-64 Linux only, this is {platform.system()} on {platform.machine()}"
    missing = [program for program in ("g++", "cmake", "ninja") if not shutil.which(program, path=PATH)]
    return f"simt needs {', '.join(missing)}" if missing else None


def build(name):
    """The library of one target of tests/simt/CMakeLists.txt, up to date."""
    cmake, ninja = (shutil.which(program, path=PATH) for program in ("cmake", "ninja"))
    options = {
        "CMAKE_MAKE_PROGRAM": ninja,
        "CMAKE_CXX_COMPILER": "g++",
        "PYBIND11_INCLUDE": pybind11.get_include(),
        "PYTHON_INCLUDE": sysconfig.get_path("include"),
    }
    configure = [cmake, "-G", "Ninja", "-S", SIMT, "-B", BUILD, *(f"-D{key}={value}" for key, value in options.items())]
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two test runs may build at once
        for command in (configure, [cmake, "--build", BUILD, "--target", name]):
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
    return BUILD / f"{name}.so"


def symbols(library):
    """Name, offset and size of every `__shared__` variable: the thread_local ones of the module, without their guards."""
    table = subprocess.run(["readelf", "-sWC", library], capture_output=True, text=True, check=True).stdout
    rows = (line.split(maxsplit=7) for line in table.splitlines())
    own = (row for row in rows if len(row) == 8 and row[3] == "TLS" and row[6] != "UND")
    found = {(row[7].rpartition("::")[2], int(row[1], 16), int(row[2], 0)) for row in own}
    return [row for row in found if not row[0].startswith("simt_guard_")]


def load(name):
    """The module in tests/simt/<name>.cpp, built if need be; skips the test where that cannot be done."""
    if reason := unsupported():
        pytest.skip(reason)
    library = build(name)
    spec = importlib.util.spec_from_file_location(name, library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.set_shared_variables(symbols(library))
    return module


def explain(module, report):
    """The faults of a report, a line each, with the source line where it is known."""
    lines = []
    for fault in report["faults"]:
        command = ["addr2line", "-ise", module.__file__, hex(fault["pc"])]
        frames = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() if fault["pc"] else []
        where = next((frame for frame in frames if not frame.startswith("simt.h")), "")
        lines.append("{kind}: {kernel} block {block} thread {thread} {message}, {count} times ".format(**fault) + where)
    return "\n".join(lines)


def assert_clean(module, report):
    assert not report["faults"], explain(module, report)
