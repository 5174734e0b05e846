"""Networks tailored by Taylor: find the channels a trained CNN does not need, remove them in place, retrain."""

from taylored import criteria, ops
from taylored._checkpoint import load, save
from taylored._compact import Removed, compact, restore, verify
from taylored._errors import CheckpointError, ExportError, PlanError, TraceError, VerificationError
from taylored._export import export
from taylored._graph.rules import trace_rule
from taylored._graph.tracing import trace
from taylored._graph.values import ChannelGraph, Group
from taylored._masking import masked
from taylored._moments import InputMoments
from taylored._oracle.measure import oracle
from taylored._plan import PrunePlan, diff, rehearse
from taylored._planning import make_plan, random_plan
from taylored._proof import Verification
from taylored._prune import PruneResult, prune
from taylored._recalibrate import recalibrate
from taylored._residual import ResidualScorer
from taylored._score import TaylorScorer
from taylored._shrink import shrink
from taylored.criteria import spearman

# Where they live is nobody's business: pickles and pages name them as they are imported.
for _public in (ChannelGraph, Group, InputMoments, PrunePlan, PruneResult, Removed, ResidualScorer, TaylorScorer, Verification):
    _public.__module__ = __name__
del _public

__version__ = "0.2.0"
__all__ = [
    "ChannelGraph",
    "CheckpointError",
    "ExportError",
    "Group",
    "InputMoments",
    "PlanError",
    "PrunePlan",
    "PruneResult",
    "Removed",
    "ResidualScorer",
    "TaylorScorer",
    "TraceError",
    "Verification",
    "VerificationError",
    "compact",
    "criteria",
    "diff",
    "export",
    "load",
    "make_plan",
    "masked",
    "ops",
    "oracle",
    "prune",
    "random_plan",
    "recalibrate",
    "rehearse",
    "restore",
    "save",
    "shrink",
    "spearman",
    "trace",
    "trace_rule",
    "verify",
]
