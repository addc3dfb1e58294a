"""Both ends of a connection show that they hold the group's key, and neither sends it.

    driver -> rank    32 bytes: the driver's nonce
    rank   -> driver  32 bytes: the rank's nonce; 32: HMAC-SHA256(key, "rank" + both nonces)
    driver -> rank    32 bytes: HMAC-SHA256(key, "driver" + both nonces)

What follows on the connection is neither signed nor encrypted: the key keeps strangers and ranks of
other groups from connecting, not who can read or change packets of the group's network. Connections
of torch.distributed, between ranks, are not made here and have no handshake.
"""

import hashlib
import hmac
import os
import socket
import time
from typing import Final

HANDSHAKE_SECONDS: Final = 5.0
KEY_BYTES: Final = 32
_NONCE: Final = 32
_PROOF: Final = hashlib.sha256().digest_size


class AuthError(ConnectionError):
    """The other end does not hold this group's key, or does not speak."""


def new_key() -> bytes:
    return os.urandom(KEY_BYTES)


def admit(connection: socket.socket, key: bytes) -> None:
    """The driver's part, on a connection just accepted. Raises AuthError, after HANDSHAKE_SECONDS
    in all at the latest; the timeout of the connection is as before."""
    _exchange(connection, key, driver=True)


def introduce(connection: socket.socket, key: bytes) -> None:
    """A rank's part, on a connection just made. Raises AuthError."""
    _exchange(connection, key, driver=False)


def _exchange(connection: socket.socket, key: bytes, *, driver: bool) -> None:
    before = connection.gettimeout()
    connection.settimeout(HANDSHAKE_SECONDS)
    deadline = time.monotonic() + HANDSHAKE_SECONDS
    try:
        mine = os.urandom(_NONCE)
        if driver:
            connection.sendall(mine)
            theirs = _receive(connection, _NONCE, deadline)
            proof = _receive(connection, _PROOF, deadline)
            _check(proof, _proof(key, b"rank", mine, theirs))
            connection.sendall(_proof(key, b"driver", mine, theirs))
        else:
            theirs = _receive(connection, _NONCE, deadline)
            connection.sendall(mine + _proof(key, b"rank", theirs, mine))
            _check(_receive(connection, _PROOF, deadline), _proof(key, b"driver", theirs, mine))
    except OSError as error:
        if isinstance(error, AuthError):
            raise
        raise AuthError(f"the other end broke the handshake off: {error}") from error
    finally:
        connection.settimeout(before)


def _proof(key: bytes, role: bytes, driver_nonce: bytes, rank_nonce: bytes) -> bytes:
    return hmac.digest(key, role + driver_nonce + rank_nonce, "sha256")


def _check(given: bytes, expected: bytes) -> None:
    if not hmac.compare_digest(given, expected):
        raise AuthError("the other end does not hold this group's key")


def _receive(connection: socket.socket, size: int, deadline: float) -> bytes:
    data = b""
    while len(data) < size:
        # Of all parts together: who sends a byte now and then does not prolong it.
        left = deadline - time.monotonic()
        if left <= 0:
            raise AuthError(f"the handshake took longer than {HANDSHAKE_SECONDS:g} s")
        connection.settimeout(left)
        part = connection.recv(size - len(data))
        if not part:
            raise AuthError("the other end hung up during the handshake")
        data += part
    return data
