"""The command: `taylored prune` takes a classifier and a folder of images, and leaves a smaller one and a report;
`taylored shrink` does so without training, `taylored rank` judges the criteria, `taylored export` writes what was pruned for
other runtimes.
"""

import ctypes
import platform
import sys

import taylored
from taylored._cli.data import DataError
from taylored._cli.export import export
from taylored._cli.job import OutError
from taylored._cli.options import parser
from taylored._cli.prune import prune
from taylored._cli.rank import rank
from taylored._cli.shrink import shrink
from taylored._cli.zoo import ModelError
from taylored._errors import CheckpointError, ExportError, PlanError, TraceError, VerificationError

COMMANDS = {"prune": prune, "shrink": shrink, "rank": rank, "export": export}
ERRORS = (
    DataError,
    ModelError,
    OutError,
    CheckpointError,
    PlanError,
    TraceError,
    VerificationError,
    ExportError,
    FloatingPointError,
)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status: 0, 2 for what the options can mend, 1 for the disk, 130 when interrupted."""
    options = parser(taylored.__version__).parse_args(arguments)
    _keep_freed_memory()
    try:
        COMMANDS[options.command](options)
    except ERRORS as error:
        print(f"taylored: {_one_line(error)}", file=sys.stderr)
        return 2
    except OSError as error:  # a full disk, a file that vanished: it says which
        print(f"taylored: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ntaylored: interrupted; the same command with --resume goes on from there", file=sys.stderr)
        return 130
    return 0


def _keep_freed_memory() -> None:
    """Let the process keep the memory that tensors leave behind. glibc hands every large block back to the kernel and gets it
    again page by page, at each layer of each step: a training step on a CPU took 1.5 times as long."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for option in (-3, -1):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD: mallopt(3)
            libc.mallopt(option, 2**31 - 1)


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if lines[0].startswith("Caught "):  # a worker process hands its error over behind its traceback and its type
        return lines[-1].partition("Error: ")[2]
    return " ".join(lines)
