"""metrics.jsonl, and what the terminal says of it."""

import json
import math
import time
from pathlib import Path

from taylored._files import write_atomically


class Log:
    """metrics.jsonl: one line per event, on disk as soon as it happens, and a shorter one on the terminal."""

    def __init__(self, path: Path):
        whole = path.read_text().rpartition("\n")[0].splitlines() if path.exists() else []  # without a torn last line
        write_atomically(path, "".join(f"{line}\n" for line in whole).encode())
        earlier = json.loads(whole[-1])["elapsed"] if whole else 0.0  # of the run that is resumed
        self.since = time.perf_counter() - earlier
        self.path = path

    def elapsed(self) -> float:
        """Seconds that the run has taken, without the time between an interruption and --resume."""
        return time.perf_counter() - self.since

    def write(self, event: dict) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps(without_nan(event) | {"elapsed": round(self.elapsed(), 3)}) + "\n")
        if event["event"] != "latency":
            print(_line(event), flush=True)


def without_nan(value):
    """JSON has no NaN: null."""
    if isinstance(value, dict):
        return {k: without_nan(v) for k, v in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def _line(event) -> str:
    number = event.get("round", event.get("epoch", event.get("target", "")))
    words = [f"{event['event'].replace('_', ' ')} {number}".ljust(18)]
    if "flops" in event:
        words += [f"{event['flops_left']:6.1%} of the FLOPs", f"{event['units']:6d} units"]
    if event.get("loss") is not None:
        words.append(f"loss {event['loss']:.4f}")
    words += [f"{name} {event[name]:.2%}" for name in ("accuracy", "agreement") if name in event]
    return "  ".join([*words, f"{event['seconds']:.1f} s"])
