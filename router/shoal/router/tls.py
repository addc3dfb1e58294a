"""TLS of the HTTP port: a certificate that is renewed while connections go on.

A Secret's files are replaced as a whole, by the turn of one symbolic link; new connections get
the new certificate within POLL_SECONDS, those that are there keep theirs.
"""

import asyncio
import logging
import ssl
from pathlib import Path

log = logging.getLogger(__name__)

POLL_SECONDS = 10.0

_Stamp = tuple[tuple[int, int], ...]


class BadCertificate(Exception):
    """The files are of no use; the message names them."""


class Certificate:
    """`context` is the server's, and always holds the last certificate that could be loaded."""

    def __init__(self, chain: Path, key: Path) -> None:
        """Raises BadCertificate."""
        self._chain, self._key = chain, key
        self.context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self.context.set_alpn_protocols(["http/1.1"])
        self._stamp = self._load()

    async def run(self) -> None:
        """Takes over new files. Never returns."""
        while True:
            await asyncio.sleep(POLL_SECONDS)
            self.renew()

    def renew(self) -> bool:
        """Whether other files were there, and loaded. Files that do not fit change nothing."""
        try:
            if self._look() == self._stamp:
                return False
            # A context takes over a chain before it knows that the key fits: try on another.
            Certificate(self._chain, self._key)
            self._stamp = self._load()
        except (OSError, BadCertificate) as error:
            log.error("the certificate is not renewed, the last good stays: %s", error)
            return False
        log.info("the certificate %s is renewed", self._chain)
        return True

    def _load(self) -> _Stamp:
        try:
            stamp = self._look()
            self.context.load_cert_chain(self._chain, self._key)
        except ssl.SSLError as error:
            raise BadCertificate(
                f"--tls-cert-file {self._chain} and --tls-key-file {self._key} are no "
                f"certificate in PEM with its key: {error.reason or error}"
            ) from error
        except OSError as error:
            raise BadCertificate(f"{error.filename or self._chain}: {error.strerror}") from error
        return stamp

    def _look(self) -> _Stamp:
        return tuple(
            (found.st_mtime_ns, found.st_ino) for found in (self._chain.stat(), self._key.stat())
        )
