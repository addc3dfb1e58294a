"""HTTPS of the router: the certificate and its renewal."""

import logging
import socket
import ssl
import threading
from pathlib import Path

import pytest
import trustme

from shoal.router.tls import BadCertificate, Certificate


class Files:
    """A folder as a mounted Secret, and what its authority issues."""

    def __init__(self, folder: Path) -> None:
        self.authority = trustme.CA()
        self.chain, self.key = folder / "tls.crt", folder / "tls.key"
        self.issue()

    def issue(self) -> int:
        """A new certificate; returns its serial number."""
        made = self.authority.issue_cert("localhost")
        for path, blob in ((self.chain, made.cert_chain_pems[0]), (self.key, made.private_key_pem)):
            fresh = path.with_suffix(".new")
            blob.write_to_path(fresh)
            fresh.replace(path)
        return serial(ssl.PEM_cert_to_DER_cert(self.chain.read_text()))


def serial(der: bytes) -> int:
    from cryptography.x509 import load_der_x509_certificate

    return load_der_x509_certificate(der).serial_number


def shown(certificate: Certificate, authority: trustme.CA) -> int:
    """The serial number that a client sees in a handshake."""
    client = ssl.create_default_context()
    authority.configure_trust(client)
    here, there = socket.socketpair()

    def serve() -> None:
        with certificate.context.wrap_socket(there, server_side=True) as wrapped:
            wrapped.recv(1)

    server = threading.Thread(target=serve)
    server.start()
    with client.wrap_socket(here, server_hostname="localhost") as wrapped:
        der = wrapped.getpeercert(binary_form=True)
        wrapped.send(b"x")
        server.join()
    assert der is not None
    return serial(der)


def test_new_files_are_served_without_a_restart(tmp_path: Path) -> None:
    """After a rotation new connections see the new certificate; else nothing is loaded."""
    files = Files(tmp_path)
    certificate = Certificate(files.chain, files.key)
    first = shown(certificate, files.authority)
    assert not certificate.renew()
    second = files.issue()
    assert certificate.renew()
    assert shown(certificate, files.authority) == second != first


def test_files_that_do_not_fit_change_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A chain without its key (half a rotation) leaves the last good one in force."""
    files = Files(tmp_path)
    certificate = Certificate(files.chain, files.key)
    before = shown(certificate, files.authority)
    key = files.key.read_bytes()
    files.issue()
    files.key.write_bytes(key)
    with caplog.at_level(logging.ERROR):
        assert not certificate.renew()
    assert "last good" in caplog.text
    assert shown(certificate, files.authority) == before


def test_useless_files_are_named_at_the_start(tmp_path: Path) -> None:
    """A missing file and a file that is no certificate each get a sentence."""
    files = Files(tmp_path)
    with pytest.raises(BadCertificate, match=r"missing\.crt: No such file"):
        Certificate(tmp_path / "missing.crt", files.key)
    files.chain.write_text("hello")
    with pytest.raises(BadCertificate, match="--tls-cert-file"):
        Certificate(files.chain, files.key)
