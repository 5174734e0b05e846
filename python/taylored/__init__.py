"""Networks tailored by Taylor: find the channels a trained CNN does not need, remove them in place, retrain."""

import torch

from taylored import criteria
from taylored.checkpoint import CheckpointError, load, save
from taylored.compact import Removed, compact, masked, restore
from taylored.criteria import spearman
from taylored.export import ExportError, export
from taylored.labels import TraceError
from taylored.oracle import oracle
from taylored.plan import PlanError, PrunePlan, diff, make_plan, random_plan, rehearse
from taylored.prune import PruneResult, prune
from taylored.rules import trace_rule
from taylored.score import TaylorScorer
from taylored.trace import ChannelGraph, Group, trace

# Plain values: torch.load(..., weights_only=True) may make them, and a checkpoint of one's own may hold them.
torch.serialization.add_safe_globals([PrunePlan, Removed])

__version__ = "0.1.0"
__all__ = [
    "ChannelGraph",
    "CheckpointError",
    "ExportError",
    "Group",
    "PlanError",
    "PrunePlan",
    "PruneResult",
    "Removed",
    "TaylorScorer",
    "TraceError",
    "compact",
    "criteria",
    "diff",
    "export",
    "load",
    "make_plan",
    "masked",
    "oracle",
    "prune",
    "random_plan",
    "rehearse",
    "restore",
    "save",
    "spearman",
    "trace",
    "trace_rule",
]
