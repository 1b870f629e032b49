"""The keys of a run: names, rights on the files, and that renewing keeps join files valid."""

from __future__ import annotations

import datetime
import ipaddress
import stat
from pathlib import Path

import pytest
from cryptography import x509

from protocol.address import BadAddress
from protocol.certificates import SERVER_VALID_DAYS, write_certificates
from protocol.errors import NotAllowed
from protocol.joinfile import BadJoinFile, JoinFile
from protocol.security import CERTS_DIR, COORDINATOR_NAME, IncompleteCertificates, load_security

NOW = datetime.datetime(2030, 1, 1, tzinfo=datetime.UTC)


def test_the_server_is_signed_by_the_ca_under_all_its_names(tmp_path: Path) -> None:
    join = write_certificates(tmp_path, ["coordinator.example", "10.1.2.3", "fd00::5"], address="10.1.2.3:7070")
    server = x509.load_pem_x509_certificate((tmp_path / "server.pem").read_bytes())
    server.verify_directly_issued_by(x509.load_pem_x509_certificate(join.ca_pem.encode()))
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert {COORDINATOR_NAME, "localhost", "coordinator.example"} == set(names.get_values_for_type(x509.DNSName))
    addresses = names.get_values_for_type(x509.IPAddress)
    assert {ipaddress.ip_address(text) for text in ("127.0.0.1", "::1", "10.1.2.3", "fd00::5")} == set(addresses)
    assert not server.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert join.address == "10.1.2.3:7070"


def test_secrets_are_their_owners_only(tmp_path: Path) -> None:
    join = write_certificates(tmp_path / CERTS_DIR, [])
    for name in ("ca.key", "server.key", "join.json", "token.sha256"):
        assert stat.S_IMODE((tmp_path / CERTS_DIR / name).stat().st_mode) == 0o600
    security = load_security(tmp_path)
    assert security is not None
    assert join.token not in repr(join)
    tokens = security.admission.tokens
    assert join.token not in tokens.text()
    for secret in (security.key_pem.decode(), tokens.current, join.token):
        assert secret not in repr(security)


def test_only_the_token_is_admitted(tmp_path: Path) -> None:
    token = write_certificates(tmp_path / CERTS_DIR, []).token
    security = load_security(tmp_path)
    assert security is not None
    assert security.admission.check(f"Bearer {token}", None, 0.0) == ""
    for presented in (
        "",
        "Bearer ",
        token,
        f"Bearer {token} ",
        f"Basic {token}",
        f"Bearer {token[:-1]}",
        b"Bearer \xff",
    ):
        with pytest.raises(NotAllowed, match="missing" if presented == "" else "wrong"):
            security.admission.check(presented, None, 0.0)


def test_renewing_keeps_join_files_valid(tmp_path: Path) -> None:
    first = write_certificates(tmp_path, ["a.example"], now=NOW)
    later = NOW + datetime.timedelta(days=SERVER_VALID_DAYS)
    second = write_certificates(tmp_path, ["b.example"], now=later)
    assert (second.token, second.ca_pem) == (first.token, first.ca_pem)
    server = x509.load_pem_x509_certificate((tmp_path / "server.pem").read_bytes())
    server.verify_directly_issued_by(x509.load_pem_x509_certificate(first.ca_pem.encode()))
    assert server.not_valid_before_utc < later < server.not_valid_after_utc


def test_a_ca_that_would_end_first_is_replaced(tmp_path: Path) -> None:
    first = write_certificates(tmp_path, [], now=NOW)
    second = write_certificates(tmp_path, [], now=NOW + datetime.timedelta(days=3500))
    assert second.ca_pem != first.ca_pem
    assert second.token == first.token


@pytest.mark.parametrize("host", ["", "a b", "host:7070", "a..b", "ä.example"])
def test_a_host_that_is_none_is_refused(tmp_path: Path, host: str) -> None:
    with pytest.raises(BadAddress, match="neither a DNS name nor an IP address"):
        write_certificates(tmp_path / "certs", [host])
    assert not (tmp_path / "certs").exists()


def test_a_run_without_certificates_has_no_security(tmp_path: Path) -> None:
    assert load_security(tmp_path) is None
    write_certificates(tmp_path / CERTS_DIR, [])
    (tmp_path / CERTS_DIR / "server.key").unlink()
    with pytest.raises(IncompleteCertificates, match=r"lacks server\.key"):
        load_security(tmp_path)


def test_the_join_file_is_read_back(tmp_path: Path) -> None:
    join = write_certificates(tmp_path, [])
    assert JoinFile.read(tmp_path / "join.json") == join


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"token": "short", "ca_pem": "x"}', "\x00\xff"])
def test_what_is_no_join_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "join.json").write_text(text, encoding="latin-1")
    with pytest.raises(BadJoinFile, match="is not a join file"):
        JoinFile.read(tmp_path / "join.json")


def test_a_missing_join_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadJoinFile, match="cannot be read: No such file"):
        JoinFile.read(tmp_path / "join.json")
