"""What is used of Flower, with types: the only place that imports it.

Type checkers read the declarations, so that they need no Flower, whose requirements this repository's own environment
does not meet; they are those of flwr 1.41 and 1.42. Without Flower everything here can be imported, and nothing used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any, Protocol

from shared_core.errors import InputError

__all__ = [
    "Array",
    "ArrayRecord",
    "ClientApp",
    "ConfigRecord",
    "Context",
    "Error",
    "ErrorCode",
    "Grid",
    "Message",
    "MessageType",
    "Metadata",
    "MetricRecord",
    "RecordDict",
    "Result",
    "Scalar",
    "ServerApp",
    "Strategy",
    "ec",
    "hashes",
    "identify",
    "serialization",
    "x509",
]

Scalar = str | int | float | bool

if TYPE_CHECKING:
    # Of cryptography, which comes with Flower.
    ec: Any
    hashes: Any
    serialization: Any
    x509: Any

    class Array:
        """Bytes with a type and a shape."""

        dtype: str
        shape: tuple[int, ...]
        stype: str
        data: bytes

        def __init__(self, dtype: str, shape: tuple[int, ...], stype: str, data: bytes) -> None: ...

    class _Counted(Protocol):
        def count_bytes(self) -> int: ...

    class ArrayRecord(dict[str, Array]):
        """Arrays by name."""

        @classmethod
        def from_torch_state_dict(cls, state_dict: Mapping[str, Any]) -> ArrayRecord: ...
        def count_bytes(self) -> int: ...

    class ConfigRecord(dict[str, Any]):
        """Scalars, and lists of them, by name."""

        def count_bytes(self) -> int: ...

    class MetricRecord(dict[str, Any]):
        """Numbers, and lists of them, by name."""

        def count_bytes(self) -> int: ...

    class RecordDict(dict[str, _Counted]):
        """Records by name."""

        array_records: MutableMapping[str, ArrayRecord]
        config_records: MutableMapping[str, ConfigRecord]
        metric_records: MutableMapping[str, MetricRecord]

    class Error:
        """Why there is no content."""

        code: int
        reason: str | None

        def __init__(self, code: int, reason: str | None = None) -> None: ...

    class Metadata(Protocol):
        message_id: str
        message_type: str
        src_node_id: int
        dst_node_id: int
        reply_to_message_id: str

    class Message:
        """Content or an error, and where it goes."""

        metadata: Metadata
        content: RecordDict
        error: Error

        def __init__(
            self,
            content: RecordDict | Error,
            dst_node_id: int | None = None,
            message_type: str | None = None,
            *,
            ttl: float | None = None,
            group_id: str | None = None,
            reply_to: Message | None = None,
        ) -> None: ...
        def has_error(self) -> bool: ...

    class MessageType:
        """Kinds of messages."""

        TRAIN: str
        EVALUATE: str
        QUERY: str

    class Context:
        """What an app knows of its node and its run."""

        run_id: int
        node_id: int
        node_config: Mapping[str, Scalar]
        state: RecordDict
        run_config: Mapping[str, Scalar]

        def __init__(
            self,
            run_id: int,
            node_id: int,
            node_config: Mapping[str, Scalar],
            state: RecordDict,
            run_config: Mapping[str, Scalar],
        ) -> None: ...

    class _Node(Protocol):
        node_id: int
        last_activated_at: str

    class Grid:
        """The way to the nodes."""

        def get_nodes(self) -> Iterable[_Node]: ...
        def push_messages(self, messages: Iterable[Message]) -> Iterable[str]: ...
        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]: ...

    _Handler = Callable[[Message, Context], Message]

    class ClientApp:
        """What runs on a node."""

        def __call__(self, message: Message, context: Context) -> Message: ...
        def query(self) -> Callable[[_Handler], _Handler]: ...
        def train(self) -> Callable[[_Handler], _Handler]: ...
        def evaluate(self) -> Callable[[_Handler], _Handler]: ...

    class ServerApp:
        """What runs at the server."""

        def __call__(self, grid: Grid, context: Context) -> None: ...
        def main(self) -> Callable[[Callable[[Grid, Context], None]], Callable[[Grid, Context], None]]: ...

    class Strategy:
        """What a server does in a round."""

    class Result:
        """What a strategy returns."""

        arrays: ArrayRecord
        train_metrics_clientapp: dict[int, MetricRecord]
        evaluate_metrics_clientapp: dict[int, MetricRecord]
        evaluate_metrics_serverapp: dict[int, MetricRecord]

    class ErrorCode:
        """Codes of errors."""

        CLIENT_APP_RAISED_EXCEPTION: int
        MESSAGE_UNAVAILABLE: int
        REPLY_MESSAGE_UNAVAILABLE: int
        NODE_UNAVAILABLE: int
        CLIENT_APP_CRASHED: int

else:
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec
        from flwr.app import (
            Array,
            ArrayRecord,
            ConfigRecord,
            Context,
            Error,
            Message,
            MessageType,
            Metadata,
            MetricRecord,
            RecordDict,
        )
        from flwr.clientapp import ClientApp
        from flwr.common.constant import ErrorCode
        from flwr.serverapp import Grid, ServerApp
        from flwr.serverapp.strategy import Result, Strategy
    except ImportError as error:
        _WHY = f"fedapc.flower needs flwr 1.41 or newer ({error}): pip install 'fedapc[flower]'"

        class _Absent(type):
            def __getattr__(cls, name):
                # Whoever looks at a class asks for names of this kind, and expects to be told that there is none.
                raise AttributeError(name) if name.startswith("_") else InputError(_WHY)

        class _Missing(metaclass=_Absent):
            def __new__(cls, *_, **__):
                raise InputError(_WHY)

        Array = ArrayRecord = ConfigRecord = Context = Error = Message = MessageType = Metadata = _Missing
        MetricRecord = RecordDict = ClientApp = ErrorCode = Grid = ServerApp = Result = Strategy = _Missing
        ec = hashes = serialization = x509 = _Missing


def identify(run_id: int) -> None:
    """Say who makes messages in this process, as the programs of Flower do when they start an app.

    Raises
    ------
    InputError
        Where Flower keeps this elsewhere than 1.41 and 1.42 do.
    """
    try:
        from flwr.supercore.task_identity import (  # pyright: ignore[reportMissingImports]
            TaskIdentity,  # pyright: ignore[reportUnknownVariableType]
        )
    except ImportError as error:
        raise InputError(
            f"LocalGrid knows flwr 1.41 and 1.42, and not the one installed ({error}); install flwr==1.42.0 to try apps"
            " without a SuperLink"
        ) from error
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = run_id, 1, 1
