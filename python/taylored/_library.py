"""Find the compiled operators and load them into torch: the CPU library always, the CUDA one where torch has CUDA."""

from pathlib import Path

import torch

LIB = Path(__file__).parent / "lib"


def load():
    """Register every operator of this build under ``torch.ops.taylored``."""
    cpu = LIB / "libtaylored_cpu.so"
    if not cpu.exists():
        raise ImportError(
            f"taylored's compiled operators are missing ({cpu}). Install the package with "
            "'pip install --no-build-isolation .', or build them in a checkout with 'python setup.py build_ext --inplace'."
        )
    torch.ops.load_library(cpu)
    cuda = LIB / "libtaylored_cuda.so"
    if torch.version.cuda and cuda.exists():
        torch.ops.load_library(cuda)
