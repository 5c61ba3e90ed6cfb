"""Keys and certificates to try a federation with TLS and authenticated nodes.

    python -m fedapc.flower.certificates DIR [--host NAME]... [--node NAME]...

A trial's: keys are not protected by a password, and whoever has the folder can be anybody. In earnest, let the server's
certificate be signed by your authority, and let every site make its key itself and hand over the public half.
"""

from __future__ import annotations

import argparse
import datetime as dt
import ipaddress
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedapc.flower._flwr import ec, hashes, serialization, x509
from shared_core.errors import InputError

__all__ = ["main", "make_certificates"]


def make_certificates(
    folder: str | Path,
    hosts: Sequence[str] = ("localhost", "127.0.0.1"),
    nodes: Sequence[str] = (),
    days: int = 30,
) -> None:
    """Make an authority, a server's certificate signed by it, and keys of nodes.

    Files are ``ca.crt``, ``server.pem``, ``server.key``, and for every node ``NODE`` and ``NODE.pub``, elliptic curve
    keys in the format of OpenSSH, as SuperNodes take them. Private keys are for their owner's eyes only.

    Parameters
    ----------
    folder : to write to; files in it are not overwritten
    hosts : names and addresses of the server
    nodes : names of key files
    days : that certificates are valid

    Raises
    ------
    InputError
        For a file that is there already, or names of nodes that are no file names.

    Examples
    --------
    >>> make_certificates("certificates", nodes=["siteA", "siteB"])  # doctest: +SKIP
    """
    folder = Path(folder)
    for node in nodes:
        if Path(node).name != node or not node or node in ("ca.crt", "server.pem", "server.key"):
            raise InputError(f"node '{node}': expected a name that can be a file's, such as siteA")
    authority_key, authority = _authority(days)
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = (
        _begun(hosts[0], authority.subject, key, days)
        .add_extension(x509.SubjectAlternativeName([_general(host) for host in hosts]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(authority_key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    _write(folder / "ca.crt", authority.public_bytes(pem))
    _write(folder / "server.pem", certificate.public_bytes(pem))
    _write(folder / "server.key", _private(key, pem, serialization.PrivateFormat.PKCS8), secret=True)
    for node in nodes:
        own = ec.generate_private_key(ec.SECP384R1())
        _write(folder / node, _private(own, pem, serialization.PrivateFormat.OpenSSH), secret=True)
        public = own.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
        _write(folder / f"{node}.pub", public + b"\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    arguments : of it. Default: those of the program

    Returns
    -------
    Exit status.
    """
    parser = argparse.ArgumentParser(prog="python -m fedapc.flower.certificates", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--host", action="append", default=[], help="name or address of the server; localhost too")
    parser.add_argument("--node", action="append", default=[], help="name of a node's key file")
    given = parser.parse_args(arguments)
    try:
        make_certificates(given.folder, ["localhost", "127.0.0.1", *given.host], given.node)
    except InputError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


def _authority(days: int) -> tuple[Any, Any]:
    key = ec.generate_private_key(ec.SECP256R1())
    name = _name("fedapc trial authority")
    usage = x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=True,
        encipher_only=False,
        decipher_only=False,
    )
    certificate = (
        _begun("fedapc trial authority", name, key, days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .sign(key, hashes.SHA256())
    )
    return key, certificate


def _begun(subject: str, issuer: Any, key: Any, days: int) -> Any:
    now = dt.datetime.now(dt.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(_name(subject))
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(minutes=5))
        .not_valid_after(now + dt.timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _name(text: str) -> Any:
    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)])


def _general(host: str) -> Any:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _private(key: Any, encoding: Any, form: Any) -> bytes:
    return key.private_bytes(encoding, form, serialization.NoEncryption())


def _write(path: Path, blob: bytes, *, secret: bool = False) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if secret else 0o644)
    except FileExistsError as error:
        raise InputError(f"{path}: is there already; choose another folder, or move it away") from error
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}; choose a folder you can write to") from error
    with os.fdopen(descriptor, "wb") as file:
        file.write(blob)


if __name__ == "__main__":
    raise SystemExit(main())
