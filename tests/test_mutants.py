"""The random programs notice when any one rule is careless: taken away one at a time, each care of each rule leads to a wrong cut.

A care is one line of a rule (rules.py, moves.py) that unites, ties or freezes labels, or says which labels come out. A mutant is
the package in which that line says nothing. Here labels are the only defence: what a rehearsal sees by shapes, FLOPs and numbers
is switched off. Each step runs by itself, and beside the map that it is made of, so that what it forgets is still used.
"""

import collections
import itertools
import sys
import warnings
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from programs import STEPS, judge
from reach import FILES, RULES, Reach, unreached

from taylored import _plan
from taylored._graph import tracing
from taylored._graph.mode import LabelMode
from taylored._graph.rehearsal import Rehearsal
from taylored._graph.tracer import Tracer

CARES = ("unite", "unite_rows", "split_evenly", "freeze", "set", "share_uniform", "note_slice")
IDLE = {  # calls that say nothing
    "unite_rows": lambda labels, rows: rows.shape[1] < 2,
    "share_uniform": lambda labels, view, x, part=False: not labels.is_uniform(x),
    "note_slice": lambda labels, out, x, dim: not labels.is_uniform(x),
}
PROGRAMS = [program for step in STEPS for program in ((step,), (step, "beside"))]
SEEDS = range(4)  # a careless cut may be right by chance
# Lines without which nothing is cut wrongly: (care, rule, a part of the line) -> what becomes of the programs, and why.
KNOWN = {
    ("set", "convolution", "labels.emit(out"): ("fewer go", "filters that nothing is known to consume stay"),
    ("set", "deformed", "labels.emit(out"): ("nothing changes", "its own filters stay then; those that are judged do anyway"),
    ("unite", "deformed", "labels.match(x_label"): (
        "nothing changes",
        "what it takes in stays, whatever its weights' labels are",
    ),
    ("note_slice", "part", "note_slice"): ("fewer go", "what is written into a part of a fresh tensor stays then"),
    ("share_uniform", "split", "share_uniform"): ("fewer go", "a piece of a tensor of ones is a constant like any other then"),
    ("set", "weight_norm", "labels.set(out[0]"): ("fewer go", "a weight without labels keeps its filters"),
    ("set", "weight_norm", "labels.emit(out[1]"): ("nothing changes", "the norms are used in a backward pass alone"),
    ("freeze", "group_norm", "labels.freeze("): ("nothing changes", "all is one unit, which stays; this line says why"),
    ("freeze", "pointwise", "labels.freeze_all("): ("more go", "the tensors of the step that compares them are always equal"),
    ("unite_rows", "part", "require_all"): ("more go", "the channel taken from each head differs from all others, and stays"),
    ("unite_rows", "complex_view", "require_all"): ("fewer go", "both parts are tied by their position in the pairs"),
    ("unite_rows", "movement", "unite_rows if spread"): (
        "nothing changes",
        "what takes the output by the channel unites the same",
    ),
    ("unite_rows", "matmul", "labels.channels"): ("more go", "tied by their position in the heads, they go rightly"),
    ("unite_rows", "matmul", "labels.applied"): ("nothing changes", "it asks what `channels` has united already"),
}


class Mutants:
    """What rules say goes through here, and is not heard where it comes from the line that is `silent`; `heard` has the others."""

    def __init__(self, monkeypatch):
        self.silent: tuple[str, str, str] | None = None
        self.heard: set[tuple[str, str, str]] = set()
        self.sound: dict[tuple, str] = {}
        for mode in (Tracer, Rehearsal):
            for care in CARES:
                monkeypatch.setattr(mode, care, self._through_here(care, getattr(mode, care)))

    def _through_here(self, care, said):
        def say(labels, *args, **kwargs):
            if care in IDLE and IDLE[care](labels, *args):
                return said(labels, *args, **kwargs)
            rule, line = _place(sys._getframe(1))
            self.heard.add((care, rule, line))
            if (care, rule, line) != self.silent:
                return said(labels, *args, **kwargs)
            return said(labels, args[0], ()) if care == "set" else None

        return say

    def verdict(self, silent, program, seed) -> str:
        self.silent = silent
        try:
            return judge(program, seed)[0]
        except Exception:  # in the middle of a cut
            return "wrong"

    def fate(self, silent, programs) -> str:
        """ "wrong" if one of the programs is cut wrongly now; else what became of them."""
        found = "nothing changes"
        for seed, program in itertools.product(SEEDS, programs):
            if (program, seed) not in self.sound:
                self.sound[program, seed] = self.verdict(None, program, seed)
            before, now = self.sound[program, seed], self.verdict(silent, program, seed)
            if before in ("wrong", "refused") or now == before:  # wrong before: only a rehearsal can tell
                continue
            if now == "wrong":
                return now
            found = {"kept": "fewer go", "exact": "more go", "refused": "refused"}[now]
        return found


def _place(frame) -> tuple[str, str]:
    """The rule that runs, and the innermost of the lines of rules; empty where none does."""
    rule = line = ""
    while frame is not None and frame.f_code is not LabelMode.carry.__code__:
        if frame.f_code.co_filename in FILES:
            rule = frame.f_code.co_name
            line = line or FILES[frame.f_code.co_filename][frame.f_lineno - 1].strip()
        frame = frame.f_back
    return rule, line


def test_every_rule_and_operator_is_reached():
    reach = Reach()
    with reach.followed(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in STEPS:
            judge((step,), 0)
    assert not [rule.__name__ for rule in RULES if not reach.operators[rule]]
    assert not unreached(reach)


@pytest.mark.slow
def test_no_rule_can_be_careless_unnoticed(monkeypatch):
    monkeypatch.setattr(tracing, "_hard_coded", lambda *_: {})
    monkeypatch.setattr(_plan, "rehearse", lambda *_: None)
    mutants, programs = Mutants(monkeypatch), collections.defaultdict(list)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for program in PROGRAMS:
            mutants.heard.clear()
            mutants.verdict(None, program, 0)
            for line in mutants.heard:
                programs[line].append(program)
        fates = {line: mutants.fate(line, programs[line]) for line in programs if line[1]}
    assert len(fates) > 100
    alive = {line: fate for line, fate in fates.items() if fate != "wrong"}
    known = {line: fate for line in alive for key, (fate, _) in KNOWN.items() if key[:2] == line[:2] and key[2] in line[2]}
    assert alive == known and len(known) == len(KNOWN)
