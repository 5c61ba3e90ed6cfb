"""The same clients and server on Flower: simulated, or over a network with TLS; ``pip install 'fedapc[flower]'``.

Nothing here is imported by ``import fedapc``, and Flower by nothing before it is used: its import takes seconds.
"""

from typing import TYPE_CHECKING

from shared_core.lazy import attach

if TYPE_CHECKING:
    from fedapc.flower.certificates import make_certificates as make_certificates
    from fedapc.flower.client import client_app as client_app
    from fedapc.flower.project import write_project as write_project
    from fedapc.flower.server import server_app as server_app
    from fedapc.flower.strategy import FedAPCStrategy as FedAPCStrategy
    from fedapc.flower.testing import LocalGrid as LocalGrid

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "certificates": ["make_certificates"],
        "client": ["client_app"],
        "project": ["write_project"],
        "server": ["server_app"],
        "strategy": ["FedAPCStrategy"],
        "testing": ["LocalGrid"],
    },
)
