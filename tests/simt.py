"""Builds and loads the test modules of csrc/simt: kernels on the CPU, under its execution model of CUDA."""

import hashlib
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

ROOT = Path(__file__).parent.parent
SIMT = ROOT / "csrc/simt"
SCHEDULES = ("ascending", "reverse", "random", "ahead", "behind")

# Enough optimisation for kernels to touch memory as their source says and no more; line tables for the reports.
FLAGS = ["-std=c++20", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas"]
FLAGS += ["-fsanitize=undefined", "-fno-sanitize-recover=all"]
# The instrumentation calls csrc/simt/simt.cpp: the sanitizer's own library is not linked.
INSTRUMENTED = ["-fsanitize=thread", "--param=tsan-distinguish-volatile=1", "-fno-thread-jumps"]


def unsupported():
    """Why the modules cannot be built here, or None."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return f"simt switches stacks on x86-64 Linux only, this is {platform.system()} on {platform.machine()}"
    return None if shutil.which("g++") else "simt needs g++"


def compile_once(output, command, inputs):
    """Run `command` into a file named by the hash of all that goes in, unless it is there. Returns its path."""
    version = subprocess.run(["g++", "--version"], capture_output=True, text=True, check=True).stdout
    digest = hashlib.sha256(repr([command, version, sys.version]).encode())
    for path in inputs:
        digest.update(Path(path).read_bytes())
    stem, _, suffix = output.rpartition(".")
    path = ROOT / "build/simt" / f"{stem}-{digest.hexdigest()[:16]}.{suffix}"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(f".{os.getpid()}")  # two test runs may build at once
        subprocess.run([*command, "-o", fresh], check=True)
        fresh.rename(path)
    return path


def symbols(library):
    """Name, offset and size of every `__shared__` variable: the thread_local ones of the module, without their guards."""
    table = subprocess.run(["readelf", "-sWC", library], capture_output=True, text=True, check=True).stdout
    rows = (line.split(maxsplit=7) for line in table.splitlines())
    own = (row for row in rows if len(row) == 8 and row[3] == "TLS" and row[6] != "UND")
    found = {(row[7].rpartition("::")[2], int(row[1], 16), int(row[2], 0)) for row in own}
    return [row for row in found if not row[0].startswith("simt_guard_")]


def load(name):
    """The module in csrc/simt/<name>.cpp, built if need be; skips the test where that cannot be done."""
    if reason := unsupported():
        pytest.skip(reason)
    source, machine = SIMT / f"{name}.cpp", SIMT / "simt.cpp"
    headers = [*sorted(SIMT.glob("*.h")), *sorted((ROOT / "csrc").glob("*.h")), *sorted((ROOT / "csrc/cuda").glob("*.cuh"))]
    include = [f"-I{path}" for path in (SIMT, ROOT / "csrc/cuda", pybind11.get_include(), sysconfig.get_path("include"))]
    # The kernels' objects come first: of an inline function that both have, the linker keeps the instrumented one.
    objects = [
        compile_once(f"{name}.o", ["g++", *FLAGS, *INSTRUMENTED, *include, "-c", source], [source, *headers]),
        compile_once("machine.o", ["g++", *FLAGS, "-O2", "-c", machine], [machine, *headers]),
    ]
    library = compile_once(f"{name}.so", ["g++", *FLAGS, "-shared", *objects], objects)
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
