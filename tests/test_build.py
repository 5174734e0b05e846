"""The build: what setup.py says when something is missing, and what the library it made depends on."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from taylored import _library

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def build():
    """setup.py as a module: it builds only when run."""
    spec = importlib.util.spec_from_file_location("taylored_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def refusal(function) -> str:
    with pytest.raises(SystemExit) as raised:
        function()
    said = str(raised.value)
    assert "\n" not in said, "one line says what is missing and what brings it"
    return said


def test_torch_missing(build, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    said = refusal(build.find_torch)
    assert "needs torch" in said and "pip install 'torch>=2.10'" in said and "--no-build-isolation" in said


@pytest.mark.parametrize("version", ["1.13.1", "2.9.1+cu128"])
def test_torch_too_old(build, monkeypatch, version):
    monkeypatch.setattr(torch, "__version__", version)
    assert f"torch {version} is too old" in refusal(build.find_torch)


@pytest.mark.parametrize("version", ["2.10.0", "2.14.1+cu130", "3.0.0a0+git123"])
def test_torch_new_enough(build, monkeypatch, version):
    monkeypatch.setattr(torch, "__version__", version)
    include, lib = build.find_torch()
    assert any((Path(folder) / "torch/csrc/stable/library.h").exists() for folder in include)
    assert list(Path(lib).glob("libtorch_cpu.*"))


def test_no_compiler(build, monkeypatch, tmp_path):
    monkeypatch.setattr(build, "PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    said = refusal(build.find_compiler)
    assert "no C++ compiler" in said and "c++, g++, clang++" in said and "apt install g++" in said
    monkeypatch.setenv("CXX", "icpx -O2")
    assert "looked for icpx" in refusal(build.find_compiler)


def script(path: Path, says: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{says}\n")
    path.chmod(0o755)
    return path


def test_no_cmake_no_ninja(build, monkeypatch, tmp_path):
    monkeypatch.setattr(build, "PATH", str(tmp_path))
    assert refusal(build.find_cmake) == "taylored: no cmake found. Install it: pip install cmake"
    assert refusal(lambda: build.find_program("ninja")) == "taylored: no ninja found. Install it: pip install ninja"


def test_cmake_too_old(build, monkeypatch, tmp_path):
    monkeypatch.setattr(build, "PATH", str(tmp_path))
    cmake = script(tmp_path / "cmake", "echo cmake version 3.25.1")
    assert refusal(build.find_cmake) == f"taylored: {cmake} is older than 3.26. Install a newer one: pip install 'cmake>=3.26'"
    script(cmake, "echo cmake version 3.26.0")
    assert build.find_cmake() == str(cmake)


def nvcc(folder: Path, top: Path | None) -> Path:
    """A script that answers --dryrun as nvcc does: on standard error, with where its toolkit is."""
    return script(folder / "nvcc", f"echo '#$ TOP={top}' >&2" if top else "")


def test_cuda_is_left_out_with_the_reason(build, monkeypatch, tmp_path):
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setattr(build, "PATH", str(tmp_path / "empty"))
    assert build.find_cuda() == (None, "no nvcc on the PATH")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nowhere"))
    assert build.find_cuda() == (None, "no nvcc in CUDA_HOME")

    nvcc(tmp_path / "mute" / "bin", None)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "mute"))
    assert "does not say where its toolkit is" in build.find_cuda()[1]

    # Half installed: the compiler without the headers, as conda's cuda-nvcc leaves it.
    nvcc(tmp_path / "half" / "bin", tmp_path / "half")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "half"))
    assert build.find_cuda() == (
        None,
        f"nvcc found, but its toolkit in {tmp_path / 'half'} has no headers (include/cuda_runtime.h)",
    )


def test_cuda_is_found_behind_a_wrapper(build, monkeypatch, tmp_path):
    toolkit = tmp_path / "toolkit"
    (toolkit / "include").mkdir(parents=True)
    (toolkit / "include" / "cuda_runtime.h").touch()
    nvcc(tmp_path / "bin", toolkit)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setattr(build, "PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    assert build.find_cuda() == (toolkit, None)


def test_cmake_alone_says_who_calls_it(build, tmp_path):
    cmake = shutil.which("cmake", path=build.PATH)
    assert cmake, "cmake is part of the environment that builds the package"
    done = subprocess.run([cmake, "-S", ROOT, "-B", tmp_path], capture_output=True, text=True)
    assert done.returncode != 0 and "TORCH_INCLUDE is not set" in done.stderr and "pip install" in done.stderr


def test_library_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(_library, "LIB", tmp_path)
    with pytest.raises(ImportError, match=r"operators are missing.*pip install --no-build-isolation"):
        _library.load()


def test_the_library_needs_only_the_stable_abi():
    """No C++ symbol of torch and none of Python: what lets one wheel serve every later version of both."""
    program = shutil.which("nm")
    assert program, "nm comes with the compiler that built the library"
    for library in _library.LIB.glob("*.so"):
        listing = subprocess.run([program, "-D", "--undefined-only", library], capture_output=True, text=True, check=True).stdout
        needed = [line.split()[-1] for line in listing.splitlines()]
        foreign = [name for name in needed if "@" not in name and not name.startswith(("aoti_torch_", "torch_", "_ITM_", "__"))]
        assert any(name.startswith("aoti_torch_") for name in needed) and not foreign
