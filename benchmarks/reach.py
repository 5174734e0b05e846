"""Which rules of the tracer the steps of the random programs reach, and which lines and branches of the rules they do not.

Every step of programs.py runs by itself, and the rules of `taylored._graph` are followed instruction by instruction: a branch is
reached when both of its ways are.

    OMP_NUM_THREADS=1 python benchmarks/reach.py
"""

import collections
import contextlib
import dis
import functools
import sys
import types
import warnings
from pathlib import Path
from unittest import mock

import torch
from programs import STEPS, judge

from taylored._graph import mode, moves, rules

FILES = {module.__file__: Path(module.__file__).read_text().splitlines() for module in (rules, moves)}
TEACHING = {"trace_rule", "_watched", "_packet", "_learn", "rule_of", "_rules"}  # of rules.py: how a rule is found, and taught
RULES = {*rules.RULES.values(), *rules.FOREIGN.values(), moves.opaque}
# Operators with a rule that no forward pass on the CPU gives, and why.
OUT_OF_REACH = {
    "cudnn_batch_norm": "a GPU's",
    "miopen_batch_norm": "a GPU's",
    "size": "TorchScript's",
    "sym_size": "asked of a tensor itself",
    "avg_pool1d": "taken apart on its way",
    "adaptive_avg_pool2d": "taken apart on its way",
    "glu_jvp": "of derivatives in forward mode",
    "_has_compatible_shallow_copy_type": "asked when a parameter's data are replaced, not in a forward pass",
}


class Reach:
    """What of the rules has run: operators by rule, and the steps from one instruction to the next."""

    def __init__(self):
        self.operators = collections.defaultdict(set)
        self.steps: set[tuple[types.CodeType, int, int]] = set()

    @contextlib.contextmanager
    def followed(self):
        """Everything that a tracer does within is noted."""
        find, opaque = mode.rule_of, mode.opaque

        def rule_of(func):
            if (rule := find(func)) is not None:
                self.operators[rule].add(func.overloadpacket)
            return rule and self._follow(rule)

        def without_rule(*args):
            self.operators[moves.opaque].add("any other")
            return self._follow(opaque)(*args)

        known = {name: self._follow(getattr(mode, name)) for name in ("uniform", "noise")}  # which the mode asks for
        with mock.patch.multiple(mode, rule_of=rule_of, opaque=without_rule, **known):
            yield

    @functools.cache  # noqa: B019  (one for each rule)
    def _follow(self, rule):
        @functools.wraps(rule)
        def run(*args):
            before = sys.gettrace()
            sys.settrace(self._enter)
            try:
                return rule(*args)
            finally:
                sys.settrace(before)

        return run

    def _enter(self, frame, event, arg):
        if frame.f_code.co_filename not in FILES:
            return None
        frame.f_trace_opcodes, last = True, -1

        def instruction(frame, event, arg):
            nonlocal last
            if event == "opcode":
                self.steps.add((frame.f_code, last, frame.f_lasti))
                last = frame.f_lasti
            return instruction

        return instruction

    def missed(self) -> list[str]:
        """Lines that never ran, and conditions that always went one way."""
        found = []
        for code in codes():
            ran = {offset for c, _, offset in self.steps if c is code}
            instructions = list(dis.get_instructions(code))
            lines = {offset: line for offset, line in dis.findlinestarts(code) if line is not None}
            of_offset, line = {}, code.co_firstlineno
            for step in instructions:
                of_offset[step.offset] = line = lines.get(step.offset, line)
            for line in sorted(set(of_offset.values()) - {of_offset[o] for o in ran if o in of_offset} - {code.co_firstlineno}):
                found.append(f"{code.co_name}, never: {_source(code, line)}")
            for step, after in zip(instructions, instructions[1:]):
                if "JUMP" in step.opname and "IF" in step.opname and step.offset in ran:
                    ways = {step.argval, after.offset} - {o for c, last, o in self.steps if c is code and last == step.offset}
                    if ways:
                        found.append(f"{code.co_name}, one way only: {_source(code, of_offset[step.offset])}")
        return list(dict.fromkeys(found))


def codes():
    """The code of every rule, and of what they are made of."""
    for module in (rules, moves):
        for name, value in vars(module).items():
            if isinstance(value, types.FunctionType) and value.__code__.co_filename == module.__file__ and name not in TEACHING:
                yield from _nested(value.__code__)


def _nested(code):
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _nested(constant)


def _source(code, line) -> str:
    return f"{Path(code.co_filename).name}:{line}: {FILES[code.co_filename][line - 1].strip()}"


def unreached(reach) -> list[str]:
    """Operators with a rule that no step gives, nor torch: it takes some apart before they come."""
    reached = set().union(*reach.operators.values())
    return [
        packet.__name__
        for packet in rules.RULES
        if packet not in reached and packet.__name__ not in OUT_OF_REACH and not _taken_apart(packet)
    ]


def _taken_apart(packet) -> bool:
    composite = torch._C.DispatchKey.CompositeImplicitAutograd
    return all(getattr(packet, name).has_kernel_for_dispatch_key(composite) for name in packet.overloads())


def main():
    warnings.simplefilter("ignore")
    reach = Reach()
    with reach.followed():
        for step in STEPS:
            judge((step,), 0)
    for rule in sorted(RULES, key=lambda rule: rule.__name__):
        print(f"{rule.__name__:14} {len(reach.operators[rule]):3} operators")
    print("rules that are not reached:", sorted(r.__name__ for r in RULES if not reach.operators[r]) or "none")
    print("operators with a rule that are not reached:", sorted(unreached(reach)) or "none")
    print("\n".join(["lines and branches that are not reached:", *reach.missed()]))


if __name__ == "__main__":
    main()
