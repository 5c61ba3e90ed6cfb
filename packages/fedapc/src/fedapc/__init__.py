"""Federated continual learning: a shared base, sparse parts of each task, and attention over the parts of others.

After Yoon et al., "Federated Continual Learning with Weighted Inter-client Transfer", ICML 2021.
"""

from typing import TYPE_CHECKING

from shared_core.lazy import attach

if TYPE_CHECKING:
    from fedapc.baselines import METHODS as METHODS
    from fedapc.baselines import MethodInfo as MethodInfo
    from fedapc.baselines import Training as Training
    from fedapc.baselines import build as build
    from fedapc.client import Client as Client
    from fedapc.client import Learning as Learning
    from fedapc.config import FedAPCConfig as FedAPCConfig
    from fedapc.data import BENCHMARKS as BENCHMARKS
    from fedapc.data import Benchmark as Benchmark
    from fedapc.data import TaskFile as TaskFile
    from fedapc.data import benchmark as benchmark
    from fedapc.data import read_tasks as read_tasks
    from fedapc.data import write_example as write_example
    from fedapc.decomposition import DecomposedModel as DecomposedModel
    from fedapc.decomposition import Layout as Layout
    from fedapc.decomposition import initial_base as initial_base
    from fedapc.engine import LocalFleet as LocalFleet
    from fedapc.engine import ProcessFleet as ProcessFleet
    from fedapc.engine import simulate as simulate
    from fedapc.export import export_network as export_network
    from fedapc.federation import FedAPC as FedAPC
    from fedapc.federation import Federation as Federation
    from fedapc.federation import Progress as Progress
    from fedapc.ledger import Entry as Entry
    from fedapc.ledger import Ledger as Ledger
    from fedapc.networks import lenet as lenet
    from fedapc.networks import mlp as mlp
    from fedapc.networks import resnet18 as resnet18
    from fedapc.objective import RetroactivePenalty as RetroactivePenalty
    from fedapc.probing import probe as probe
    from fedapc.report import Report as Report
    from fedapc.selection import KnowledgeBase as KnowledgeBase
    from fedapc.server import Server as Server
    from fedapc.sparse import SparseTensor as SparseTensor
    from fedapc.tasks import Task as Task

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "baselines": ["METHODS", "MethodInfo", "Training", "build"],
        "client": ["Client", "Learning"],
        "config": ["FedAPCConfig"],
        "data": ["BENCHMARKS", "Benchmark", "TaskFile", "benchmark", "read_tasks", "write_example"],
        "decomposition": ["DecomposedModel", "Layout", "initial_base"],
        "engine": ["LocalFleet", "ProcessFleet", "simulate"],
        "export": ["export_network"],
        "federation": ["FedAPC", "Federation", "Progress"],
        "ledger": ["Entry", "Ledger"],
        "networks": ["lenet", "mlp", "resnet18"],
        "objective": ["RetroactivePenalty"],
        "probing": ["probe"],
        "report": ["Report"],
        "selection": ["KnowledgeBase"],
        "server": ["Server"],
        "sparse": ["SparseTensor"],
        "tasks": ["Task"],
    },
)
