"""`shoal serve`: one model without a YAML; every key of spec.engine is a flag."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import click

from shoal.api.names import API_VERSION, KIND, NAME_MAX_LENGTH
from shoal.api.routes import RoutingPolicy
from shoal.api.workload import EngineSpec, ParallelismSpec
from shoal.cli.errors import UsageError
from shoal.cli.flags import given, model_flags
from shoal.cli.options import store_option
from shoal.cli.output import format_data
from shoal.cli.serving import ServeAt, listen_options, run

if TYPE_CHECKING:
    from shoal.operator.local.store import Store


@click.command()
@click.argument("model")
@click.option("--name", help="Name of the service and the model. Default: made from MODEL.")
@click.option("--alias", "aliases", multiple=True, help="One more model id; repeatable.")
@click.option("--revision", help="Version of a package, or branch, tag or commit of a hub model.")
@click.option("--replicas", type=click.IntRange(min=0), default=1, show_default=True)
@click.option("--cpu", help='CPU cores of each replica, such as "4".')
@click.option("--memory", help="Memory of each replica, such as 8Gi; the KV cache counts.")
@click.option(
    "--policy",
    type=click.Choice([policy.value for policy in RoutingPolicy]),
    help="How the router picks a replica.  [default: PrefixAware]",
)
@model_flags(EngineSpec)
@model_flags(ParallelismSpec)
@click.option("--dry-run", is_flag=True, help="Print the service as YAML and stop.")
@listen_options()
@store_option()
def command(
    model: str,
    name: str | None,
    aliases: tuple[str, ...],
    revision: str | None,
    replicas: int,
    cpu: str | None,
    memory: str | None,
    policy: str | None,
    dry_run: bool,
    host: str,
    port: int,
    grpc_port: int,
    store: "Store",
    **flags: Any,
) -> None:
    """Serve MODEL on this machine until Ctrl-C.

    MODEL is py://package, hf://org/name, file:///path or a plain path.
    """
    from shoal.api.types import parse_document
    from shoal.operator.unsupported import unsupported

    uri = model_uri(model)
    spec: dict[str, Any] = {
        "model": _present(uri=uri, revision=revision, aliases=list(aliases)),
        "engine": given(EngineSpec, flags),
        "parallelism": given(ParallelismSpec, flags),
        "resources": _present(cpu=cpu, memory=memory),
        "replicas": replicas,
        "routing": _present(policy=policy),
    }
    document = {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "metadata": {"name": name or service_name(uri)},
        "spec": {key: value for key, value in spec.items() if value != {}},
    }
    service = parse_document(document)
    if missing := unsupported(service.spec):
        raise UsageError("\n".join(missing))
    if dry_run:
        click.echo(format_data(document, "yaml"))
        return
    run(store, [service], ServeAt(host, port, grpc_port))


def model_uri(model: str) -> str:
    """`model` itself if it is a URI, else file:// of an existing path. Raises CliError."""
    if "://" in model:
        return model
    path = Path(model).expanduser()
    if path.exists():
        return path.absolute().as_uri()
    if re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        raise UsageError(
            f"there is no file {model!r} here; for the model of that name on the "
            f"Hugging Face Hub write hf://{model}"
        )
    raise UsageError(
        f"there is no file {model!r} here; write a path, py://package or hf://org/name"
    )


def service_name(uri: str) -> str:
    """A valid service name from the last part of `uri`: hf://Qwen/Qwen3-8B@main -> qwen3-8b."""
    location = uri.partition("://")[2].rstrip("/").partition("@")[0]
    last = unquote(location.rpartition("/")[2])
    stem = re.sub(r"\.(gguf|safetensors)$", "", last, flags=re.IGNORECASE)
    name = re.sub(r"[^a-z0-9]+", "-", stem.lower()).strip("-")
    if not name[:1].isalpha():
        name = f"model-{name}"
    return name[:NAME_MAX_LENGTH].rstrip("-")


def _present(**values: Any) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value not in (None, [])}
