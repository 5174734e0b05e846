"""Write files so that no reader ever sees half of one."""

import os
import secrets
from pathlib import Path


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
        if error.filename is not None:
            error.filename, error.filename2 = str(path), None  # nobody knows the temporary one
        raise
    finally:
        temporary.unlink(missing_ok=True)
