"""Builds and loads the test modules of csrc/simt: kernels on the CPU, under its execution model of CUDA."""

import hashlib
import importlib.util
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
    path = ROOT / "build/simt" / f"{output.stem}-{digest.hexdigest()[:16]}{output.suffix}"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run([*command, "-o", f"{path}.new"], check=True)
        Path(f"{path}.new").rename(path)
    return path


def shared_variables(library):
    """Name, offset and size of every `__shared__` variable: the thread_local ones of the module, without their guards."""
    table = subprocess.run(["readelf", "-sWC", library], capture_output=True, text=True, check=True).stdout
    rows = (line.split(maxsplit=7) for line in table.splitlines())
    found = {(r[7].rpartition("::")[2], int(r[1], 16), int(r[2], 0)) for r in rows if len(r) == 8 and r[3] == "TLS" and r[6] != "UND"}
    return [row for row in found if not row[0].startswith("simt_guard_")]


def load(name):
    """The module in csrc/simt/<name>.cpp, built if need be; skips the test where that cannot be done."""
    if reason := unsupported():
        pytest.skip(reason)
    source, machine = SIMT / f"{name}.cpp", SIMT / "simt.cpp"
    headers = [*sorted(SIMT.glob("*.h")), *sorted((ROOT / "csrc/cuda").glob("*.cuh"))]
    include = [f"-I{SIMT}", f"-I{ROOT / 'csrc/cuda'}", f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    machine_o = compile_once(Path("machine.o"), ["g++", *FLAGS, "-O2", "-c", machine], [machine, *headers])
    command = ["g++", *FLAGS, *INSTRUMENTED, *include, "-c", source]
    module_o = compile_once(Path(f"{name}.o"), command, [source, *headers])
    objects = [module_o, machine_o]
    library = compile_once(Path(f"{name}.so"), ["g++", "-shared", *objects], objects)
    spec = importlib.util.spec_from_file_location(name, library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.set_shared_variables(shared_variables(library))
    return module
