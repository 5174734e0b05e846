"""Two processes of DistributedDataParallel train, prune and train on as one process does with the joint batch; processes that
disagree are told so, and so is who forgets to wrap the cut model again."""

import os
import subprocess
import sys
from pathlib import Path

import models as nets
import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import taylored
from taylored import _compact

STEPS, BATCH = 4, 8


def batches(rank=0, world=1):
    """This process's share of every joint batch."""
    images = [nets.inputs(BATCH, seed=n, dtype=torch.float64) for n in range(STEPS)]
    return [(x[rank::world], (torch.arange(BATCH) % 5)[rank::world]) for x in images]


def net(name):
    """In eval mode: in training batch norm would take its statistics from each process's own share."""
    return nets.small(name, dtype=torch.float64)


def by_hand(name, kind, reduction, world=1, rank=0):
    """Train and score, cut, train on. Returns the scores, the plan's digest and the final state."""
    model = net(name)
    optimizer = getattr(torch.optim, kind)(
        model.parameters(), **({"lr": 0.05, "momentum": 0.9} if kind == "SGD" else {"lr": 1e-3})
    )
    graph = taylored.trace(model, nets.inputs(dtype=torch.float64))

    def wrapped():
        return DistributedDataParallel(model, gradient_as_bucket_view=kind == "SGD") if world > 1 else model

    def train(runner):
        for x, y in batches(rank, world):
            optimizer.zero_grad()
            cross_entropy(runner(x), y).backward()
            optimizer.step()

    runner = wrapped()
    with taylored.TaylorScorer(runner, graph, reduction=reduction) as scorer:
        train(runner)
    plan = taylored.make_plan(graph, scorer.scores(), target_flops=0.6)
    taylored.compact(runner, plan, optimizer=optimizer)
    if world > 1:
        try:
            runner(nets.inputs(dtype=torch.float64))
        except RuntimeError as error:
            assert "wrap it again" in str(error)
        else:
            raise AssertionError("a cut model was trained in its old wrapper")
    train(wrapped())
    return scorer.scores(), plan.digest, model.state_dict()


def by_the_loop(folder, world=1, rank=0):
    model = net("residual")
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    result = taylored.prune(
        model, batches(rank, world), cross_entropy, optimizer, nets.inputs(dtype=torch.float64), target_flops=0.5, rounds=3,
        final_epochs=1, freeze_statistics=True, progress=False, mend=0, checkpoint=folder / f"{world}.safetensors",
        wrap=DistributedDataParallel if world > 1 else None,
    )  # fmt: skip
    return result.plan.digest, model.state_dict()


def mended(world=1, rank=0):
    """Each process measures its own share; all end with the same bits. Scores, moments over all folds, and the model."""
    model = net("residual")
    runner = DistributedDataParallel(model) if world > 1 else model
    graph = taylored.trace(model, nets.inputs(dtype=torch.float64))
    with taylored.ResidualScorer(runner, graph) as scorer:
        for inputs, targets in batches(rank, world):
            cross_entropy(runner(inputs), targets).backward()
    moments = {name: found.over() for name, found in scorer.collected().items()}
    scorer.scores()
    taylored.compact(runner, taylored.random_plan(graph, 0.5), mend=scorer)
    return moments, model.state_dict()


def one_fails(rank):
    """What each process is told when the cut is proven wrong in one of them, and whether its model is as it was."""
    model = net("chain")
    before = nets.snapshot(model)
    plan = taylored.random_plan(taylored.trace(model, nets.inputs(dtype=torch.float64)), 0.5)
    proven = _compact.prove

    def prove(*args):
        if rank == 1:
            raise taylored.VerificationError("they part at layer 'second'", 0.5, "second")
        return proven(*args)

    _compact.prove = prove
    try:
        taylored.compact(DistributedDataParallel(model), plan, verify=nets.inputs(dtype=torch.float64))
    except taylored.VerificationError as error:
        return str(error), nets.unchanged(before, model)
    finally:
        _compact.prove = proven
    return "nothing", False


def disagreement(rank):
    """What a process is told whose plan is another one than the others', and whether its model is as it was."""
    model = net("chain")
    plan = taylored.random_plan(taylored.trace(model, nets.inputs(dtype=torch.float64)), 0.5, seed=rank)
    before = nets.snapshot(model)
    try:
        taylored.compact(DistributedDataParallel(model), plan)
    except taylored.PlanError as error:
        return str(error), nets.unchanged(before, model)
    return "nothing", False


CASES = [("residual", "SGD", "abs"), ("depthwise", "AdamW", "square"), ("twice", "SGD", "abs")]


def work(folder):
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    found = {f"{case}": by_hand(*case, world, rank) for case in CASES}
    found["loop"] = by_the_loop(folder, world, rank)
    found["mended"] = mended(world, rank)
    found["one_fails"] = one_fails(rank)
    found["disagreement"] = disagreement(rank)
    torch.save(found, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__, str(folder)]
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(torchrun, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path})
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def ranks(folder):
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def close(a, b):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_two_processes_end_where_one_with_the_joint_batch_does(ranks, case):
    scores, plan, state = by_hand(*case)
    for found in ranks:
        close(found[f"{case}"][0], scores)
        assert found[f"{case}"][1] == plan
        close(found[f"{case}"][2], state)


def test_the_loop_on_two_processes_ends_where_it_does_on_one(ranks, folder):
    plan, state = by_the_loop(folder)
    for found in ranks:
        assert found["loop"][0] == plan
        close(found["loop"][1], state)
    fresh = net("residual")
    taylored.load(fresh, folder / "2.safetensors")
    close(fresh.state_dict(), ranks[0]["loop"][1])


def test_processes_mend_with_the_moments_of_all_and_to_the_same_bits(ranks):
    moments, _ = mended()
    (theirs, first), (_, second) = (found["mended"] for found in ranks)
    for name, expected in moments.items():
        for a, b in zip(theirs[name], expected, strict=True):
            torch.testing.assert_close(a, b)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_all_processes_refuse_a_cut_that_one_of_them_proves_wrong(ranks):
    for rank, found in enumerate(ranks):
        said, untouched = found["one_fails"]
        assert "'second'" in said and untouched and ("in process 1" in said) == (rank == 0)


def test_processes_with_different_plans_are_refused(ranks):
    for found in ranks:
        said, untouched = found["disagreement"]
        assert "do not have the same plan" in said and untouched


def test_a_wrapped_model_is_not_given_to_the_loop():
    class Wrapped(DistributedDataParallel):
        def __init__(self, module):
            nn.Module.__init__(self)
            self.module = module

    model = net("chain")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(ValueError, match="wrap=DistributedDataParallel"):
        taylored.prune(Wrapped(model), batches(), cross_entropy, optimizer, nets.inputs(), target_flops=0.5)


if __name__ == "__main__":
    work(Path(sys.argv[1]))
