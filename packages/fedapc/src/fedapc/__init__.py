"""Federated continual learning: a shared base, sparse parts of each task, and attention over the parts of others.

After Yoon et al., "Federated Continual Learning with Weighted Inter-client Transfer", ICML 2021.
"""

from typing import TYPE_CHECKING

from shared_core.lazy import attach

if TYPE_CHECKING:
    from fedapc.client import Client as Client
    from fedapc.client import Learning as Learning
    from fedapc.decomposition import DecomposedModel as DecomposedModel
    from fedapc.decomposition import Layout as Layout
    from fedapc.decomposition import initial_base as initial_base
    from fedapc.engine import LocalFleet as LocalFleet
    from fedapc.engine import ProcessFleet as ProcessFleet
    from fedapc.engine import simulate as simulate
    from fedapc.ledger import Entry as Entry
    from fedapc.ledger import Ledger as Ledger
    from fedapc.objective import RetroactivePenalty as RetroactivePenalty
    from fedapc.selection import KnowledgeBase as KnowledgeBase
    from fedapc.server import Server as Server
    from fedapc.sparse import SparseTensor as SparseTensor
    from fedapc.tasks import Task as Task

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "client": ["Client", "Learning"],
        "decomposition": ["DecomposedModel", "Layout", "initial_base"],
        "engine": ["LocalFleet", "ProcessFleet", "simulate"],
        "ledger": ["Entry", "Ledger"],
        "objective": ["RetroactivePenalty"],
        "selection": ["KnowledgeBase"],
        "server": ["Server"],
        "sparse": ["SparseTensor"],
        "tasks": ["Task"],
    },
)
