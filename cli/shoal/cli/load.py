"""Asks a router for its load."""

import grpc

from shoal.api.v1 import router_pb2, router_pb2_grpc
from shoal.cli.errors import CliError

_MAX_BYTES = 64 << 20


def ask_router(address: str, seconds: float) -> router_pb2.RouterLoad:
    """`Router.GetLoad` of the router at `address`. Raises CliError."""
    options = (("grpc.max_receive_message_length", _MAX_BYTES),)
    with grpc.insecure_channel(address, options=options) as channel:
        try:
            return router_pb2_grpc.RouterStub(channel).GetLoad(
                router_pb2.GetLoadRequest(), timeout=seconds
            )
        except grpc.RpcError as error:
            why = error.details() if isinstance(error, grpc.Call) else str(error)
            raise CliError(f"the router does not tell its load ({address}): {why}") from error
