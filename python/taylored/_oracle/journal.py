"""How far the oracle has come: the sums so far, in memory and in a file from which the same call goes on."""

import time
from pathlib import Path

import torch

from taylored._files import DamagedFile, read_tensors, write_tensors

FORMAT = "taylored-oracle-2"
SAVE_EVERY = 5.0  # seconds


class Journal:
    """The sums so far, and how far that is: in memory, and in a file that a killed run can go on from."""

    def __init__(self, path, rank, world, fingerprint, mine, graph):
        self.path = None if path is None else Path(path if world == 1 else f"{path}.{rank}-of-{world}")
        self.fingerprint = fingerprint
        self.sums = {name: torch.zeros(graph.group(name).units, dtype=torch.float64) for name in mine}
        self.examples, self.place, self.saved = 0, (0, 0), time.monotonic()
        self.resumed = (0, 0)  # the piece of the data and the step in it that a former run has come to
        if self.path is not None and self.path.exists():
            self._load()

    def _load(self) -> None:
        try:
            header, sums = read_tensors(self.path, FORMAT)
        except DamagedFile as error:
            raise ValueError(
                f"checkpoint={str(self.path)!r} is damaged or of another kind: {error}; name another file, or delete it"
            ) from error
        if header["fingerprint"] != self.fingerprint or sums.keys() != self.sums.keys():
            raise ValueError(
                f"checkpoint={str(self.path)!r} is of another model, choice of units, precision, memory or number of processes: "
                "name another file, or delete it"
            )
        self.sums, self.resumed = sums, tuple(header["place"])

    def starts(self, number, examples):
        """A piece of the data begins. Its examples are counted whether or not a former run has measured them."""
        self.place = (number, 0)
        self.examples += examples

    def skips(self) -> bool:
        """Called before each step, in the same order in every run: whether a former run has taken it."""
        self.place = (self.place[0], self.place[1] + 1)
        return self.place <= self.resumed

    def add(self, name, units, change):
        self.sums[name].index_add_(0, units, change)
        if self.path is not None and time.monotonic() - self.saved > SAVE_EVERY:
            self.save()

    def save(self):
        if self.path is not None:
            write_tensors(self.path, FORMAT, {"fingerprint": self.fingerprint, "place": self.place}, self.sums)
            self.saved = time.monotonic()
