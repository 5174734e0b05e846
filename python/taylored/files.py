"""Write files so that no reader ever sees half of one, and tell whether what is in them is what it was."""

import hashlib
import os
import secrets
from pathlib import Path

import torch


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
