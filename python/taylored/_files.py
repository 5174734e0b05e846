"""Files of tensors with a header in JSON: written so that no reader ever sees half of one, read without executing code, and
proven to be what was written.

All of ours are safetensors files, which any reader opens as a state dict.
"""

import hashlib
import json
import os
import secrets
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a file in one step: it holds the old bytes or all of the new ones, whatever happens. Raises OSError."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.filename is None:
            raise
        raise type(error)(error.errno, error.strerror, str(path)) from error  # nobody knows the temporary one
    finally:
        temporary.unlink(missing_ok=True)


def digest(text: str, tensors: dict[str, torch.Tensor]) -> str:
    """A short name for a text and some tensors together: another one if any name, dtype, shape or byte is another."""
    total = hashlib.blake2b(text.encode(), digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return total.hexdigest()


class DamagedFile(ValueError):
    """A file is not one of ours, of another format, or not what was written."""


def write_tensors(path: str | os.PathLike, format: str, header: dict, tensors: dict[str, torch.Tensor]) -> None:
    """Write tensors and a header of JSON values, atomically. format: a name for what it is, which the reader asks for."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = json.loads(json.dumps(header))  # as it comes back
    header["digest"] = _digest(header, tensors)
    write_atomically(Path(path), serialize(tensors, metadata={"format": format, "taylored": json.dumps(header)}))


def read_tensors(path: str | os.PathLike, format: str) -> tuple[dict, dict[str, torch.Tensor]]:
    """The header and the tensors of a file that `write_tensors` wrote.

    Raises FileNotFoundError, or DamagedFile for one that is of another format or does not match its digest."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != format:
                raise DamagedFile(f"{path} was not written by taylored as {format!r}, its format is {metadata.get('format')!r}")
            header = json.loads(metadata["taylored"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        if header.pop("digest") != _digest(header, tensors):
            raise DamagedFile(f"{path} is damaged: its contents do not match their digest")
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError, KeyError, AttributeError, TypeError, ValueError) as error:
        if isinstance(error, DamagedFile):
            raise
        raise DamagedFile(f"{path} is damaged or no safetensors file: {type(error).__name__}: {error}") from error
    return header, tensors


def _digest(header, tensors) -> str:
    return digest(json.dumps(header, sort_keys=True), tensors)
