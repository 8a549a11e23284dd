"""TLS for tests: a throw-away CA, and a TLS front for a server that has none of its own."""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from services.embedded import HOST, free_port

needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl command")


class Certificates:
    """A CA, a server's certificate for loopback and a client's, all for one day."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.ca, self._ca_key = folder / "ca.pem", folder / "ca.key"
        self._openssl("req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=throw-away", self._ca_key, self.ca)
        self.server, self.server_key = self._signed("server")
        self.client, self.client_key = self._signed("client")

    def _signed(self, name: str) -> tuple[Path, Path]:
        key, request, cert = (self._folder / f"{name}.{end}" for end in ("key", "csr", "pem"))
        self._openssl(f"req -newkey rsa:2048 -nodes -subj /CN={name}", key, request)
        extension = self._folder / "extension"
        extension.write_text(f"subjectAltName=IP:{HOST}\n")
        sign = f"x509 -req -in {request} -CA {self.ca} -CAkey {self._ca_key} -CAcreateserial -days 1"
        subprocess.run(
            ["openssl", *sign.split(), "-extfile", str(extension), "-out", str(cert)], check=True, capture_output=True
        )
        return cert, key

    @staticmethod
    def _openssl(command: str, key: Path, out: Path) -> None:
        command += f" -keyout {key} -out {out}"
        subprocess.run(["openssl", *command.split()], check=True, capture_output=True)


@contextmanager
def tls_front(backend: str, certificates: Certificates, port: int | None = None) -> Iterator[str]:
    """Terminates TLS in front of the plain server at `backend`, for clients with a certificate of the CA only."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(certificates.ca))
    context.load_cert_chain(certificates.server, certificates.server_key)
    context.verify_mode = ssl.CERT_REQUIRED
    host, _, backend_port = backend.rpartition(":")

    def serve(raw: socket.socket) -> None:
        with (
            suppress(OSError),
            context.wrap_socket(raw, server_side=True) as client,
            socket.create_connection((host, int(backend_port))) as server,
        ):
            client.settimeout(
                0.02
            )  # one thread for both directions: a TLS connection may not be read and written at once
            server.settimeout(0.02)
            while True:
                for source, sink in ((client, server), (server, client)):
                    with suppress(TimeoutError):
                        data = source.recv(1 << 20)
                        if not data:
                            return
                        sink.sendall(data)

    def accept(listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                raw, _ = listener.accept()
                threading.Thread(target=serve, args=(raw,), daemon=True).start()

    with socket.create_server((HOST, port or free_port())) as listener:
        threading.Thread(target=accept, args=(listener,), daemon=True).start()
        yield f"{HOST}:{listener.getsockname()[1]}"
