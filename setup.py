"""Build the operators with CMake and Ninja and put them into taylored/lib.

CMakeLists.txt describes the build. This file finds what it needs (torch, a compiler, CMake, Ninja, a CUDA toolkit), says in
one line what is missing and what brings it, and tags the wheel cp310-abi3: the libraries use torch's stable ABI and no
Python symbol, so one wheel serves every later torch and CPython.
"""

import os
import re
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
TORCH_FLOOR = (2, 10)
CMAKE_FLOOR = (3, 26)  # as CMakeLists.txt says
# pip does not put a virtual environment's own programs (cmake, ninja) on the PATH of the build it starts there.
PATH = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])


def fail(problem, remedy):
    raise SystemExit(f"taylored: {problem}. {remedy}")


def older(version, floor):
    return tuple(map(int, re.findall(r"\d+", version)[:2])) < floor


def find_program(name):
    return shutil.which(name, path=PATH) or fail(f"no {name} found", f"Install it: pip install {name}")


def find_cmake():
    cmake = find_program("cmake")
    version = subprocess.run([cmake, "--version"], capture_output=True, text=True).stdout
    if older(version, CMAKE_FLOOR):
        fail(f"{cmake} is older than 3.26", "Install a newer one: pip install 'cmake>=3.26'")
    return cmake


def find_torch():
    """Where torch's headers and libraries are."""
    remedy = "Install it and build against it: pip install 'torch>=2.10' && pip install --no-build-isolation ."
    try:
        import torch
        from torch.utils import cpp_extension
    except ModuleNotFoundError as error:
        fail(f"the build needs torch, and importing it failed ({error})", remedy)
    if older(torch.__version__, TORCH_FLOOR):
        fail(f"torch {torch.__version__} is too old, 2.10 is the oldest with the stable ABI used here", remedy)
    return cpp_extension.include_paths(), cpp_extension.library_paths()[0]


def find_compiler():
    """The C++ compiler CMake will take: $CXX or the first of the usual names."""
    names = [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    if not any(shutil.which(name, path=PATH) for name in names):
        fail(
            f"no C++ compiler found (looked for {', '.join(names)})",
            "Install one with C++20 (Debian: apt install g++; conda: conda install gxx), or name it in CXX",
        )


def find_cuda():
    """(toolkit root, None), or (None, why there is none). A half-installed toolkit is no reason to fail the build."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc", path=f"{home}/bin" if home else PATH)
    if not nvcc:
        return None, f"no nvcc {'in CUDA_HOME' if home else 'on the PATH'}"
    # nvcc on the PATH may be a wrapper script far from its toolkit: only nvcc itself knows where it lives.
    dry = subprocess.run([nvcc, "--dryrun", "probe.cu"], capture_output=True, text=True)
    top = re.search(r"^#\$ TOP=(.+)$", dry.stdout + dry.stderr, re.MULTILINE)
    if not top:
        return None, "nvcc does not say where its toolkit is (nvcc --dryrun prints no TOP)"
    root = Path(top[1].strip()).resolve()
    if not (root / "include" / "cuda_runtime.h").exists():
        return None, f"nvcc found, but its toolkit in {root} has no headers (include/cuda_runtime.h)"
    return root, None


class CMakeBuild(build_ext):
    """Configure, compile and install CMakeLists.txt; the destination is the wheel, or python/ for --inplace."""

    def run(self):
        include, lib = find_torch()
        find_compiler()
        cuda_root, cuda_off = find_cuda()
        cmake = find_cmake()
        ninja = find_program("ninja")
        build = Path(self.build_temp).resolve()
        self.destination = ROOT / "python" if self.inplace else Path(self.build_lib).resolve()
        options = {
            "CMAKE_MAKE_PROGRAM": ninja,
            "CMAKE_INSTALL_PREFIX": self.destination,
            "TORCH_INCLUDE": ";".join(include),
            "TORCH_LIB": lib,
            "TAYLORED_CUDA_ROOT": cuda_root or "",
            "TAYLORED_CUDA_OFF": cuda_off or "",
        }
        # --fresh: torch's paths differ from one isolated build to the next, and must not stay in CMake's cache.
        configure = [cmake, "--fresh", "-G", "Ninja", "-S", ROOT, "-B", build]
        configure += [f"-D{name}={value}" for name, value in options.items()]
        subprocess.run([*configure, *shlex.split(os.environ.get("CMAKE_ARGS", ""))], check=True)
        subprocess.run([cmake, "--build", build], check=True)
        subprocess.run([cmake, "--install", build, "--strip"], check=True)

    def get_outputs(self):
        return [str(path) for path in sorted((Path(self.build_lib) / "taylored" / "lib").glob("*"))]

    def get_output_mapping(self):  # what an editable install asks for: the libraries are already in place
        return {}


if __name__ == "__main__":
    setup(
        ext_modules=[Extension("taylored.lib", sources=[], py_limited_api=True)],
        cmdclass={"build_ext": CMakeBuild},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )
