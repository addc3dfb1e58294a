"""`shoal up`: serves YAML files on this machine until Ctrl-C."""

from typing import TYPE_CHECKING

import click

from shoal.cli.errors import UsageError
from shoal.cli.options import file_option, store_option
from shoal.cli.serving import ServeAt, listen_options, run

if TYPE_CHECKING:
    from shoal.operator.local.store import Store


@click.command()
@file_option(required=False)
@click.option("--watch", is_flag=True, help="Apply the files again whenever they are saved.")
@listen_options()
@store_option()
def command(
    filenames: tuple[str, ...], watch: bool, host: str, port: int, grpc_port: int, store: "Store"
) -> None:
    """Serve the services of YAML files until Ctrl-C.

    Every pod of the operator's plan runs as a process of this machine, behind one router that
    speaks the OpenAI API and gRPC. Meanwhile `shoal get`, `logs`, `apply`, `scale` and `delete`
    work from another terminal. A second Ctrl-C ends everything at once.

    Without -f, what `shoal apply` left in the state directory is served.
    """
    from shoal.cli.manifests import load

    services = load(filenames)
    if not filenames and not store.services_signature():
        raise UsageError("no service to serve; name a file: shoal up -f service.yaml")
    run(store, services, ServeAt(host, port, grpc_port), watched=filenames if watch else ())
