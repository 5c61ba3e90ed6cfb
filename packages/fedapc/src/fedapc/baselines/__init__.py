"""What FedAPC is held against, and FedAPC without one of its parts each; all driven by the same engines (spec 3).

Methods that do not decompose weights train a *body*, which is every trained parameter but the head, and a head and
running statistics for every task. Those that do are FedAPC's own client and server with other settings.
"""

from typing import TYPE_CHECKING

from shared_core.lazy import attach

if TYPE_CHECKING:
    from fedapc.baselines.coordinators import DenseServer as DenseServer
    from fedapc.baselines.coordinators import LocalServer as LocalServer
    from fedapc.baselines.ewc import ElasticWeights as ElasticWeights
    from fedapc.baselines.fedcurv import Curvature as Curvature
    from fedapc.baselines.fedcurv import CurvatureServer as CurvatureServer
    from fedapc.baselines.fisher import diagonal_fisher as diagonal_fisher
    from fedapc.baselines.methods import METHODS as METHODS
    from fedapc.baselines.methods import MethodInfo as MethodInfo
    from fedapc.baselines.methods import build as build
    from fedapc.baselines.network import LocalClient as LocalClient
    from fedapc.baselines.network import NetworkClient as NetworkClient
    from fedapc.baselines.network import body_layout as body_layout
    from fedapc.baselines.network import initial_body as initial_body
    from fedapc.baselines.scaffold import ControlVariates as ControlVariates
    from fedapc.baselines.scaffold import ScaffoldServer as ScaffoldServer
    from fedapc.baselines.strategy import Strategy as Strategy
    from fedapc.baselines.training import Training as Training

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "coordinators": ["DenseServer", "LocalServer"],
        "ewc": ["ElasticWeights"],
        "fisher": ["diagonal_fisher"],
        "fedcurv": ["Curvature", "CurvatureServer"],
        "methods": ["METHODS", "MethodInfo", "build"],
        "network": ["LocalClient", "NetworkClient", "body_layout", "initial_body"],
        "scaffold": ["ControlVariates", "ScaffoldServer"],
        "strategy": ["Strategy"],
        "training": ["Training"],
    },
)
