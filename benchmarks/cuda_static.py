"""What can be said of the CUDA kernels without a GPU, from the library's own machine code: registers, spills, shared memory,
theoretical occupancy and 16-byte loads, per kernel and architecture. Then predicted times: least traffic over the memory
bandwidth of three GPUs, beside the traffic of eager PyTorch. Predicted, not measured: a bound that kernels approach.

    pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm
    python benchmarks/cuda_static.py [--kernels WORD] [library]
"""

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from pathlib import Path

# Of one multiprocessor: threads, registers, KiB of shared memory (NVIDIA's tuning guides). The system takes 1 KiB of each block,
# which the compiler counts from sm_90 on.
LIMITS = {"sm_80": (2048, 65536, 164), "sm_90": (2048, 65536, 228), "sm_100": (2048, 65536, 228), "sm_120": (1536, 65536, 100)}
THREADS = 256  # of every block
BANDWIDTH = {"A100 80GB": 2039e9, "H100 SXM": 3350e9, "B200": 8000e9}  # bytes per second, from the data sheets
BATCH = 32
VGG16 = [(64, 224), (128, 112), (256, 56), (512, 28), (512, 14)]  # channels, height and width


def tools():
    """The environment in which cuobjdump finds itself and nvdisasm, wherever pip or a toolkit put them."""
    folders = [str(path) for path in Path(sysconfig.get_path("purelib")).glob("nvidia/*/bin")]
    path = os.pathsep.join([*folders, os.environ.get("PATH", ""), f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin"])
    missing = [name for name in ("cuobjdump", "nvdisasm") if not shutil.which(name, path=path)]
    if missing:
        sys.exit(f"{' and '.join(missing)} not found: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    return os.environ | {"PATH": path}


def dump(option, library):
    """cuobjdump's lines, names demangled and without the parameters and namespaces."""
    environment = tools()
    program = shutil.which("cuobjdump", path=environment["PATH"])
    text = subprocess.run([program, option, library], env=environment, capture_output=True, text=True, check=True).stdout
    if shutil.which("c++filt"):
        text = subprocess.run(["c++filt"], input=text, capture_output=True, text=True, check=True).stdout
    return text.splitlines()


def by_kernel(lines):
    """Lines of each (architecture, kernel)."""
    arch, kernel = None, None
    for line in lines:
        if match := re.match(r"\s*arch = (\S+)", line):
            arch, kernel = match[1], None
        elif match := re.match(r"\s*Function\s*:?\s*(.+)", line):
            name = re.sub(r"\btaylored::(cuda::)?|^void ", "", match[1])
            kernel = re.sub(r"__nv_bfloat16", "bfloat16", re.sub(r"__half", "float16", name)).partition("(")[0].rstrip(":")
        elif kernel:
            yield (arch, kernel), line


def occupancy(arch, registers, shared):
    """Resident threads over the most there can be."""
    threads, all_registers, kib = LIMITS[arch]
    per_block = -(-registers * 32 // 256) * 256 * (THREADS // 32)
    blocks = min(threads // THREADS, all_registers // per_block, kib * 1024 // (shared + (1024 if arch == "sm_80" else 0)))
    return blocks * THREADS / threads


def report_kernels(library, word):
    usage = {}
    for key, line in by_kernel(dump("-res-usage", library)):
        if match := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", line):
            usage[key] = tuple(map(int, match.groups()))
    wide, local = Counter(), Counter()
    for key, line in by_kernel(dump("-sass", library)):
        wide[key] += bool(re.search(r"\bLDG?\.E\.[\w.]*128\b", line))
        local[key] += bool(re.search(r"\bSTL\b", line))
    print(f"{'kernel':46}{'arch':>8}{'registers':>11}{'spills':>8}{'shared':>8}{'occupancy':>11}{'16-byte loads':>15}")
    for (arch, kernel), (registers, _, shared) in sorted(usage.items(), key=lambda item: (item[0][1], int(item[0][0][3:]))):
        if word in kernel and kernel != "check_keep":  # whose stack holds printf's arguments
            share = occupancy(arch, registers, shared)
            print(f"{kernel:46}{arch:>8}{registers:11}{local[arch, kernel]:8}{shared:8}{share:11.0%}{wide[arch, kernel]:15}")
    print(f"\n{len(usage)} kernels; the library has {Path(library).stat().st_size / 2**20:.1f} MiB")


def report_times():
    """Bytes per element of x, ours and eager's: reads and writes of each pass over the map; [N, C] is left out."""
    # eager contribution: x*g (2 reads, 1 write), mean (1 read). ReLU: threshold_backward (2, 1), then the same.
    # Statistics: sum (1), square (1, 1), sum (1), x == 0 (1 and a byte), sum (a byte).
    passes = {
        "contribution": (lambda s: 2 * s, lambda s: 4 * s),
        "relu_backward with contribution": (lambda s: 3 * s, lambda s: 7 * s),
        "channel_statistics": (lambda s: s, lambda s: 5 * s + 2),
    }
    print(f"\nPredicted times in microseconds at full memory bandwidth, batch {BATCH}: ours / eager PyTorch's traffic")
    print(f"{'':32}{'map':>14}{'dtype':>10}" + "".join(f"{gpu:>18}" for gpu in BANDWIDTH) + f"{'ratio':>8}")
    for op, (ours, eager) in passes.items():
        for dtype, size in (("float32", 4), ("bfloat16", 2)):
            for channels, side in VGG16:
                elements = BATCH * channels * side * side
                row(op, f"{channels}x{side}x{side}", dtype, elements * ours(size), elements * eager(size))
    # Half of both dimensions, scattered: whole sectors of the kept rows are read, a quarter of the whole is written.
    # index_select twice: kept rows read and written, then read and half of them written.
    for shape in ((4096, 25088), (512, 512 * 9)):
        whole = shape[0] * shape[1] * 4
        row("compact_, half of two dimensions", "x".join(map(str, shape)), "float32", whole * 0.75, whole * 1.75)


def row(op, shape, dtype, ours, eager):
    cells = (f"{1e6 * ours / b:9.1f} /{1e6 * eager / b:7.1f}" for b in BANDWIDTH.values())
    print(f"{op:32}{shape:>14}{dtype:>10}" + "".join(f"{cell:>18}" for cell in cells) + f"{eager / ours:7.2f}x")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(importlib.util.find_spec("taylored").origin).parent / "lib/libtaylored_cuda.so"
    parser.add_argument("library", nargs="?", default=default, type=Path)
    parser.add_argument("--kernels", default="", metavar="WORD", help="only kernels with this in their name")
    options = parser.parse_args()
    if not options.library.exists():
        sys.exit(f"{options.library} is not there: install taylored where nvcc is on the PATH")
    report_kernels(options.library, options.kernels)
    report_times()


if __name__ == "__main__":
    main()
