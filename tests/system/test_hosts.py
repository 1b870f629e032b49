"""A run across network namespaces, over a road that loses packets and is cut for a minute, ends with the same bits."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from scripts.hosts import Hosts, NotHere, Road, carry_out, check_allowed


def why_not() -> str:
    try:
        check_allowed()
    except NotHere as missing:
        return str(missing)
    return ""


WHY_NOT = why_not()
pytestmark = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_far_lossy_slow_and_cut_off_for_a_minute(tmp_path: Path) -> None:
    road = Road(latency_s=0.2, loss=0.05, rate_bits_per_s=10e6, partition_s=60.0)
    outcome = carry_out(tmp_path, 2, road)
    assert outcome.equal
    assert outcome.seconds > 60
    share_lost = outcome.packets["lost"] / (outcome.packets["lost"] + outcome.packets["carried"])
    assert 0.02 < share_lost < 0.12, "5 % of some two thousand packets, which are lost at random"
    assert outcome.packets["cut_off"] > 0


def pinged(hosts: Hosts) -> float:
    """Milliseconds from host 0 to host 1 and back, by a TCP connection of each host's own."""
    script = (
        "import socket, time\n"
        f"server = socket.create_server(('{hosts.address(1)}', 9))\nprint('up', flush=True)\nserver.accept()"
    )
    server = subprocess.Popen(
        ["ip", "netns", "exec", hosts.names[1], sys.executable, "-c", script], stdout=subprocess.PIPE
    )
    with server:
        assert server.stdout is not None
        server.stdout.readline()
        ask = (
            "import socket, time\nbegin = time.monotonic()\n"
            f"socket.create_connection(('{hosts.address(1)}', 9), 20)\nprint(1000 * (time.monotonic() - begin))"
        )
        done = subprocess.run(
            ["ip", "netns", "exec", hosts.names[0], sys.executable, "-c", ask],
            capture_output=True,
            text=True,
            check=True,
        )
    return float(done.stdout)


def test_hosts_reach_each_other_after_the_latency_and_leave_nothing_behind() -> None:
    with Hosts(2, Road(latency_s=0.1, loss=0.0, rate_bits_per_s=1e9, partition_s=0.0)) as hosts:
        assert 200 <= pinged(hosts) < 2000
        assert hosts.traffic.carried >= 3
        names = list(hosts.names)
    left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    assert not any(name in left for name in names)
