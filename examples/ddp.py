"""Two processes of DistributedDataParallel on one CPU: `torchrun --nproc-per-node 2 examples/ddp.py`, or, which starts them
itself, `python examples/ddp.py`.
"""

import os
import subprocess
import sys

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

import taylored


def main():
    distributed.init_process_group("gloo")
    rank, world = distributed.get_rank(), distributed.get_world_size()
    torch.manual_seed(0)  # the same model and data everywhere ...
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 4),
    )
    images, labels = torch.randn(256, 3, 16, 16), torch.randint(4, (256,))
    images, labels = images[rank::world], labels[rank::world]  # ... of which each process has its share

    ddp = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.01, momentum=0.9)

    def train_epoch():
        for x, y in zip(images.split(32), labels.split(32), strict=True):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(ddp(x), y)
            loss.backward()
            optimizer.step()
        return loss.item()

    for round_number in (1, 2):
        graph = taylored.trace(ddp, images[:1])
        with taylored.TaylorScorer(ddp, graph) as scorer:  # through the wrapper: scores are added up over the processes
            train_epoch()
        plan = taylored.make_plan(graph, scorer.scores(), target_flops=0.7)
        taylored.compact(ddp, plan, optimizer)  # every process has the same plan, or nothing happens
        ddp = DistributedDataParallel(ddp.module)  # buckets of the new sizes
        if rank == 0:
            print(f"round {round_number}: {plan}")
    print(f"process {rank} of {world}: plan {plan.digest}, loss {train_epoch():.3f}", flush=True)
    distributed.destroy_process_group()


if __name__ == "__main__":
    if "RANK" in os.environ:
        main()
    else:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
        sys.exit(subprocess.call(command, env=os.environ | {"OMP_NUM_THREADS": "1"}))
