"""Export a model, pruned or not, for where it shall run: to a torch.export program or to ONNX.

In: a module and example inputs. Out: one file, for batches of any size, that has been read back and gives the same answer.
"""

import contextlib
import importlib
import io
import logging
import os
import warnings
from pathlib import Path

import torch
from torch import nn

from taylored._errors import ExportError
from taylored._files import write_atomically
from taylored._modules import Inputs, as_arguments, check_module, in_mode, two_examples
from taylored._torch_compat import tree_leaves, tree_map

FORMATS = (".onnx", ".pt2")
TOLERANCE = 1e-3  # of the largest output: other kernels add up in another order


def export(model: nn.Module, example_inputs: Inputs, path: str | os.PathLike, *, any_batch: bool = True) -> float | None:
    """Write the model, as it is in eval mode, to a file; the path's ending says of which kind: .pt2 for `torch.export.load`,
    .onnx for ONNX (needs onnx and onnxscript: `pip install 'taylored[onnx]'`).

    example_inputs: one tensor, a tuple of positional or a dict of keyword arguments. any_batch: the first dimension of every
    input may be of any size later on; otherwise it stays that of the example. The file is written atomically and without the
    memory of what was cut off.

    What was exported runs once, ONNX in onnxruntime, and is compared with the model: returns the largest difference as a
    fraction of the largest output, or None if onnxruntime is not installed. Raises ExportError, with nothing written, if a
    package is missing, the model cannot be exported, or the answers differ.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path must be a file's, got {type(path).__name__}: export(model, example_inputs, path)")
    path, model = Path(path), check_module(model, "export(model, example_inputs, path)")
    if path.suffix not in FORMATS:
        raise ExportError(f"path={str(path)!r} must end in one of {', '.join(FORMATS)}")
    if path.suffix == ".onnx" and (missing := [name for name in ("onnx", "onnxscript") if not _has(name)]):
        raise ExportError(f"ONNX needs {' and '.join(missing)}: pip install 'taylored[onnx]'")
    args, kwargs = tree_map(_copy, as_arguments(example_inputs))  # torch.export writes on the tensors what may change
    if any_batch:  # a size of one would be taken for a constant
        args, kwargs = two_examples(args, kwargs)
    with in_mode(model, training=False), torch.no_grad():
        expected = model(*args, **kwargs)
        program = _program(model, args, kwargs, any_batch)
        data = _onnx(program) if path.suffix == ".onnx" else _pt2(program)
    actual = _run_onnx(data, (args, kwargs)) if path.suffix == ".onnx" else _run_pt2(data, args, kwargs)
    difference = None if actual is None else _difference(actual, expected)
    write_atomically(path, data)
    return difference


def _copy(value):
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def _has(package) -> bool:
    return importlib.util.find_spec(package) is not None


def _program(model, args, kwargs, any_batch) -> torch.export.ExportedProgram:
    shapes = None
    if any_batch:
        batch = {0: torch.export.Dim.DYNAMIC}
        shapes = tree_map(lambda v: batch if isinstance(v, torch.Tensor) and v.ndim else None, kwargs or args)
    try:
        program = torch.export.export(model, args, kwargs, dynamic_shapes=shapes)
    except Exception as error:  # of many types, whatever the model's code or torch raises
        advice = "; any_batch=False fixes the size of the batch" if any_batch else ""
        raise ExportError(f"torch.export cannot export the model{advice}: {_first_line(error)}") from error
    for name, tensor in program.state_dict.items():  # without the memory behind a compacted tensor
        program.state_dict[name] = _packed(tensor)
    return program


def _packed(tensor):
    if tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    copy = tensor.detach().clone(memory_format=torch.preserve_format)
    return nn.Parameter(copy, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copy


def _pt2(program) -> bytes:
    file = io.BytesIO()
    torch.export.save(program, file)
    return file.getvalue()


def _run_pt2(data, args, kwargs):
    return torch.export.load(io.BytesIO(data)).module()(*args, **kwargs)


def _onnx(program) -> bytes:
    try:
        with warnings.catch_warnings(), _quiet():
            warnings.simplefilter("ignore")
            written = torch.onnx.export(program, (), dynamo=True, verbose=False)
            assert written is not None  # dynamo=True and no path: it returns a program
            return written.model_proto.SerializeToString()
    except Exception as error:  # of many types, down to protobuf's for a model above 2 GiB
        raise ExportError(f"ONNX cannot express the model: {_first_line(error)}") from error


@contextlib.contextmanager
def _quiet():
    """onnxscript tells on the log of every pass over the graph that finds nothing to do."""
    log = logging.getLogger("onnxscript")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def _run_onnx(data, inputs):
    if not _has("onnxruntime"):
        return None
    import onnxruntime

    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    arrays = [t.detach().cpu().numpy() for t in tree_leaves(inputs) if isinstance(t, torch.Tensor)]
    outputs = session.run(None, {i.name: a for i, a in zip(session.get_inputs(), arrays, strict=True)})
    return [torch.from_numpy(output) for output in outputs]


def _difference(actual, expected) -> float:
    leaves = zip(tree_leaves(actual), tree_leaves(expected), strict=True)
    pairs = [(a.detach().cpu().double(), b.detach().cpu().double()) for a, b in leaves if isinstance(b, torch.Tensor)]
    worst = max((float((a - b).abs().max() / b.abs().max().clamp(min=1e-12)) for a, b in pairs), default=0.0)
    if not worst <= TOLERANCE:
        raise ExportError(
            f"what was exported gives another answer than the model: they differ by {worst:.2g} of the largest output"
        )
    return worst


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
