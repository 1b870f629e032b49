"""A run's workers and their certificates: join files of their own, the list, revoking, renewing, expiry."""

from __future__ import annotations

import datetime
import stat
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from protocol.certificates import NoAuthority, rotate_token, write_certificates
from protocol.enrolment import (
    LOCAL_NAME,
    WORKER_VALID_DAYS,
    admitted_machines,
    issue_worker,
    kept_join_file,
    local_join,
    revoke,
)
from protocol.expiry import CertificateEnded, check_join_file, check_server
from protocol.joinfile import BadJoinFile, JoinFile
from protocol.keyfile import write_key_file
from protocol.peer import peer_of_certificate
from protocol.roster import BadRoster, Roster

NOW = datetime.datetime(2030, 1, 1, tzinfo=datetime.UTC)


@pytest.fixture
def certs(tmp_path: Path) -> Path:
    write_certificates(tmp_path / "certs", [], address="10.0.0.1:7070", now=NOW)
    return tmp_path / "certs"


def serials(certs: Path) -> dict[str, bool]:
    return {each.serial: each.revoked is not None for each in Roster.read(certs / "workers.json").certificates}


def test_a_worker_gets_a_join_file_of_its_own(certs: Path) -> None:
    path, issued = issue_worker(certs, "alice", now=NOW)
    join, general = JoinFile.read(path), JoinFile.read(certs / "join.json")
    assert (join.token, join.ca_pem, join.address) == (general.token, general.ca_pem, "10.0.0.1:7070")
    assert join.certificate_pem is not None
    certificate = x509.load_pem_x509_certificate(join.certificate_pem.encode())
    certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(join.ca_pem.encode()))
    usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    peer = peer_of_certificate(join.certificate_pem.encode())
    assert (peer.name, peer.serial, peer.expires) == ("alice", issued.serial, issued.expires)
    assert issued.expires == NOW + datetime.timedelta(days=WORKER_VALID_DAYS)
    for file in (path, certs / "workers.json"):
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert join.key_pem is not None
    assert join.key_pem not in repr(join)


def test_the_file_may_be_written_elsewhere(certs: Path, tmp_path: Path) -> None:
    path, _ = issue_worker(certs, "alice", tmp_path / "usb" / "alice.json", address="coordinator:7", now=NOW)
    assert path == tmp_path / "usb" / "alice.json"
    assert JoinFile.read(path).address == "coordinator:7"
    kept = kept_join_file(certs, "alice")
    assert kept.read_bytes() == path.read_bytes()
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    assert JoinFile.read(path).token != rotate_token(certs, 60.0, now=NOW).token == JoinFile.read(kept).token


def test_whose_files_a_new_token_concerns(certs: Path, tmp_path: Path) -> None:
    for name in ("alice", "alice", "bob", "carol", LOCAL_NAME):
        issue_worker(certs, name, now=NOW)
    revoke(certs, "carol", now=NOW)
    assert admitted_machines(certs, NOW) == ("alice", "bob")
    assert admitted_machines(certs, NOW + datetime.timedelta(days=WORKER_VALID_DAYS)) == ()


def test_a_plain_join_file_stays_readable_by_older_versions(certs: Path) -> None:
    assert "certificate_pem" not in (certs / "join.json").read_text(encoding="utf-8")


def test_revoking_a_name_or_one_serial_number(certs: Path) -> None:
    first, second, other = (issue_worker(certs, name, now=NOW)[1].serial for name in ("alice", "alice", "bob"))
    assert [each.serial for each in revoke(certs, first, now=NOW)] == [first]
    assert serials(certs) == {first: True, second: False, other: False}
    assert [each.serial for each in revoke(certs, "alice", now=NOW)] == [second]
    assert revoke(certs, "alice", now=NOW) == ()
    assert serials(certs) == {first: True, second: True, other: False}
    with pytest.raises(BadRoster, match=r"'carol' \(names: alice, bob\)"):
        revoke(certs, "carol")


@pytest.mark.parametrize("name", ["", "a b", "-a", "../a", "a" * 65, "ä"])
def test_a_name_that_is_none_is_refused(certs: Path, name: str) -> None:
    with pytest.raises(BadRoster, match="a worker's name is"):
        issue_worker(certs, name)
    assert not (certs / "workers").exists()


def test_a_run_without_certificates_says_what_to_do_first(tmp_path: Path) -> None:
    for act in (
        lambda: issue_worker(tmp_path / "certs", "alice"),
        lambda: revoke(tmp_path / "certs", "alice"),
        lambda: rotate_token(tmp_path / "certs", 0.0),
    ):
        with pytest.raises(NoAuthority, match="`dipaco certs RUN`"):
            act()
    assert not (tmp_path / "certs").exists()


def test_a_damaged_list_is_not_overwritten(certs: Path) -> None:
    (certs / "workers.json").write_text("{", encoding="utf-8")
    with pytest.raises(BadRoster, match="is damaged"):
        issue_worker(certs, "alice")
    assert (certs / "workers.json").read_text(encoding="utf-8") == "{"


def test_a_new_token_stands_in_all_join_files_of_the_run(certs: Path) -> None:
    path, _ = issue_worker(certs, "alice", now=NOW)
    before = JoinFile.read(path)
    after = rotate_token(certs, 60.0, now=NOW)
    assert after.token != before.token
    assert JoinFile.read(certs / "join.json") == after
    assert JoinFile.read(path) == before.model_copy(update={"token": after.token})
    assert write_certificates(certs, [], now=NOW).token == after.token
    hashes = (certs / "token.sha256").read_text(encoding="ascii").split()
    assert float(hashes[2]) == NOW.timestamp() + 60.0


def test_this_machine_has_one_certificate_that_is_renewed_in_time(certs: Path) -> None:
    assert local_join(certs, now=NOW) == local_join(certs, now=NOW)
    assert len(serials(certs)) == 1
    local_join(certs, now=NOW + datetime.timedelta(days=WORKER_VALID_DAYS - 1))
    assert len(serials(certs)) == 2
    revoke(certs, LOCAL_NAME)
    local_join(certs, now=NOW)
    assert sorted(serials(certs).values()) == [False, True, True]


def test_half_a_certificate_is_no_join_file(certs: Path, tmp_path: Path) -> None:
    path, _ = issue_worker(certs, "alice", now=NOW)
    half = JoinFile.read(path).model_dump_json(exclude={"key_pem"})
    write_key_file(tmp_path / "half.json", half.encode())
    with pytest.raises(BadJoinFile, match="belong together"):
        JoinFile.read(tmp_path / "half.json")


def test_the_end_of_a_workers_certificate_is_said_in_time(certs: Path) -> None:
    join = JoinFile.read(issue_worker(certs, "alice", now=NOW)[0])
    end = NOW + datetime.timedelta(days=WORKER_VALID_DAYS)
    assert check_join_file(join, NOW) == []
    [remark] = check_join_file(join, end - datetime.timedelta(days=5))
    assert "this worker's certificate ends in 5 days, on 2031-01-01 00:00 UTC; get a new join file" in remark
    with pytest.raises(CertificateEnded, match="ended on 2031-01-01"):
        check_join_file(join, end)


def test_a_certificate_of_another_run_is_named_before_anybody_is_called(certs: Path, tmp_path: Path) -> None:
    write_certificates(tmp_path / "other", [], now=NOW)
    join = JoinFile.read(issue_worker(certs, "alice", now=NOW)[0])
    other = JoinFile.read(tmp_path / "other" / "join.json")
    with pytest.raises(CertificateEnded, match="was not issued by the CA in its join file"):
        check_join_file(join.model_copy(update={"ca_pem": other.ca_pem}), NOW)


def test_the_end_of_the_coordinators_certificate_is_said_in_time(certs: Path) -> None:
    server, ca = (certs / "server.pem").read_bytes(), (certs / "ca.pem").read_bytes()
    assert check_server(server, ca, NOW) == []
    [remark] = check_server(server, ca, NOW + datetime.timedelta(days=800))
    assert "the coordinator's certificate ends in 25 days" in remark
    with pytest.raises(CertificateEnded, match="renew it with `dipaco certs RUN`"):
        check_server(server, ca, NOW + datetime.timedelta(days=826))
