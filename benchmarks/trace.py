"""Time to trace each network that benchmarks/coverage.py lists, its normalisation statistics left as they are, beside
Torch-Pruning's dependency graph of it, where torch-pruning 1.6.1 is installed. The two take turns; medians.

    OMP_NUM_THREADS=1 python benchmarks/trace.py [PATTERN]    # by default "torchvision *"
"""

import fnmatch
import importlib.util
import statistics
import sys
import time
import warnings

import coverage
import torch

import taylored

TURNS = 3


def seconds(function, *arguments):
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def their_graph(model, inputs):
    import torch_pruning as tp

    tp.DependencyGraph().build_dependency(coverage.Unpacked(model), {"inputs": inputs})


def main():
    warnings.simplefilter("ignore")
    pattern = sys.argv[1] if len(sys.argv) > 1 else "torchvision *"
    peer = importlib.util.find_spec("torch_pruning") is not None
    print(f"{'':46} {'trace':>8} {'peer':>8}\n({torch.get_num_threads()} threads, torch {torch.__version__}, {TURNS} turns)")
    ours = {}
    for name in fnmatch.filter(coverage.names(), pattern):
        source, model_name = name.split()
        model, inputs, speaker = coverage.build(source, model_name)
        inputs = inputs if isinstance(inputs, tuple) else inputs[:2]
        example = ([inputs[0]],) if isinstance(speaker, coverage.Heads) else inputs
        model.eval()
        mine, theirs, note = [], [], "" if peer else "not installed"
        for _ in range(TURNS):
            mine.append(seconds(taylored.trace, model, example))
            if peer and not note:
                try:
                    theirs.append(seconds(their_graph, speaker, inputs))
                except Exception as error:  # whatever it is, it is the finding
                    note = f"fails: {type(error).__name__}"
        ours[name] = statistics.median(mine)
        print(f"{name:46} {ours[name]:8.2f} {note or format(statistics.median(theirs), '8.2f')}", flush=True)
    networks = {name: time for name, time in ours.items() if name.split()[1] not in coverage.TRANSFORMERS.split()}
    slowest = max(networks, key=networks.get)
    print(f"slowest of {len(networks)} that are no transformers: {slowest}, {networks[slowest]:.2f} s")


if __name__ == "__main__":
    main()
