"""A run across several hosts on this machine: network namespaces, and a bad road between them that loses real packets.

Every host is a namespace with a TCP stack of its own and one TUN device. This process is the road: it carries IP
packets from one device to another after a latency, at a rate, and loses some, as tc-netem would; it needs no kernel
module for that, only root, iproute2 and /dev/net/tun. In the middle of the run the coordinator's host is cut off.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import heapq
import itertools
import json
import os
import random
import select
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from configs.load import to_yaml  # noqa: E402
from coordinator.snapshot import RunSnapshot  # noqa: E402
from dipaco.run_digest import run_digest  # noqa: E402
from scripts.crash_points import small_config  # noqa: E402
from scripts.fuzz_target import undisturbed_digest  # noqa: E402

TUN = Path("/dev/net/tun")
_SET_NAME, _TUN_WITHOUT_HEADER = 0x400454CA, 0x0001 | 0x1000
_MTU = 1500
NETWORK = "10.213.0"
PORT = 7070
PATIENCE_S = 1200.0


class NotHere(RuntimeError):
    """This machine does not allow it; the message says what is missing."""


@dataclass(frozen=True, slots=True)
class Road:
    """What happens to a packet: `latency_s` one way, `loss` of them vanish, each host sends at the rate."""

    latency_s: float = 0.2
    loss: float = 0.05
    rate_bits_per_s: float = 10e6
    partition_s: float = 60.0


@dataclass(slots=True)
class Traffic:
    """Packets that the road saw."""

    carried: int = 0
    lost: int = 0
    cut_off: int = 0


def check_allowed() -> None:
    """Raises NotHere."""
    if sys.platform != "linux" or os.geteuid() != 0:
        raise NotHere("hosts are network namespaces: this needs Linux and root")
    if shutil.which("ip") is None:
        raise NotHere("the command `ip` is missing (package iproute2)")
    if not TUN.exists():
        raise NotHere(f"{TUN} is missing (kernel without CONFIG_TUN)")
    tried = subprocess.run(["ip", "netns", "add", f"dipaco-{os.getpid()}-try"], capture_output=True, text=True)
    if tried.returncode:
        raise NotHere(f"ip netns add: {tried.stderr.strip()}")
    _ip("netns", "del", f"dipaco-{os.getpid()}-try")


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode:
        raise NotHere(f"ip {' '.join(words)}: {done.stderr.strip()}")


class Hosts:
    """So many hosts, with the road between them, for the time of the context. Host 0 is the coordinator's."""

    def __init__(self, count: int, road: Road, seed: int = 0) -> None:
        self.names = [f"dipaco-{os.getpid()}-{index}" for index in range(count)]
        self._road, self._source = road, random.Random(seed)
        self._devices: list[int] = []
        self._cut_off: set[int] = set()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._carry, name="road")
        self._free_s = [0.0] * count
        self._order = itertools.count()
        self.traffic = Traffic()

    def __enter__(self) -> Hosts:
        try:
            for index, name in enumerate(self.names):
                self._add(index, name)
        except BaseException:
            self._remove()
            raise
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._remove()

    def address(self, index: int) -> str:
        return f"{NETWORK}.{index + 1}"

    def start(self, index: int, words: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
        """A `dipaco` command on a host."""
        command = ["ip", "netns", "exec", self.names[index], sys.executable, "-m", "dipaco", *words]
        with log.open("ab") as written:
            return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=written, stderr=written)

    def cut_off(self, index: int, seconds: float) -> None:
        """Nothing reaches the host or leaves it for so long, and nobody is told."""
        self._cut_off.add(index)
        time.sleep(seconds)
        self._cut_off.discard(index)

    def _add(self, index: int, name: str) -> None:
        """A namespace with a device whose other end this process holds: it is made here and then moved there."""
        _ip("netns", "add", name)
        device = f"dp{os.getpid() % 100_000}x{index}"
        descriptor = os.open(TUN, os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(descriptor, _SET_NAME, struct.pack("16sH22x", device.encode(), _TUN_WITHOUT_HEADER))
        self._devices.append(descriptor)
        _ip("link", "set", device, "netns", name)
        _ip("-n", name, "addr", "add", f"{self.address(index)}/24", "dev", device)
        _ip("-n", name, "link", "set", "lo", "up")
        _ip("-n", name, "link", "set", device, "mtu", str(_MTU), "up")

    def _remove(self) -> None:
        for descriptor in self._devices:
            os.close(descriptor)
        for name in self.names:
            with contextlib.suppress(NotHere):
                _ip("netns", "del", name)

    def _carry(self) -> None:
        """Take packets as they come, and hand each on when its time has come."""
        under_way: list[tuple[float, int, int, bytes]] = []
        while not self._over.is_set():
            wait_s = min(0.05, max(0.0, under_way[0][0] - time.monotonic())) if under_way else 0.05
            ready, _, _ = select.select(self._devices, [], [], wait_s)
            for descriptor in ready:
                self._take(self._devices.index(descriptor), under_way)
            while under_way and under_way[0][0] <= time.monotonic():
                _, _, target, packet = heapq.heappop(under_way)
                with contextlib.suppress(OSError):  # a full device drops packets, too
                    os.write(self._devices[target], packet)

    def _take(self, index: int, under_way: list[tuple[float, int, int, bytes]]) -> None:
        with contextlib.suppress(BlockingIOError):
            while packet := os.read(self._devices[index], _MTU + 100):
                target = packet[19] - 1 if packet[0] >> 4 == 4 and len(packet) >= 20 else -1
                if not 0 <= target < len(self._devices):
                    continue  # IPv6 neighbours and the like
                if {index, target} & self._cut_off:
                    self.traffic.cut_off += 1
                    continue
                if self._source.random() < self._road.loss:
                    self.traffic.lost += 1
                    continue
                self.traffic.carried += 1
                sent_s = max(time.monotonic(), self._free_s[index]) + 8 * len(packet) / self._road.rate_bits_per_s
                self._free_s[index] = sent_s
                heapq.heappush(under_way, (sent_s + self._road.latency_s, next(self._order), target, packet))


@dataclass(slots=True)
class Outcome:
    """What the run across hosts came to."""

    digest: str
    reference_digest: str
    seconds: float
    workers: int
    road: dict[str, Any] = field(default_factory=dict)
    packets: dict[str, int] = field(default_factory=dict)

    @property
    def equal(self) -> bool:
        return self.digest == self.reference_digest


def carry_out(folder: Path, workers: int, road: Road) -> Outcome:
    """A small run over the road, its coordinator cut off in the middle; and the same run undisturbed."""
    phases = 2
    reference = undisturbed_digest(folder / "undisturbed", phases)
    begin = time.monotonic()
    with Hosts(workers + 1, road) as hosts:
        with _running(hosts, folder, workers) as (coordinator, run_dir):
            log = folder / "coordinator.log"
            _wait(lambda: "shards hold" in log.read_text(encoding="utf-8"), coordinator, log)
            hosts.cut_off(0, road.partition_s)
            _wait(lambda: coordinator.poll() is not None, None, log)
        if coordinator.returncode != 0:
            raise RuntimeError(f"the coordinator ended with {coordinator.returncode}; see {log}")
        digest = run_digest(RunSnapshot.open(run_dir), everything=True)
        seconds = time.monotonic() - begin
        return Outcome(digest, reference, seconds, workers, asdict(road), asdict(hosts.traffic))


@contextlib.contextmanager
def _running(hosts: Hosts, folder: Path, workers: int) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    config, run_dir, address = folder / "config.yaml", folder / "run", f"{hosts.address(0)}:{PORT}"
    config.write_text(to_yaml(small_config(folder)), encoding="utf-8")
    words = ["coordinator", str(config), "--run-dir", str(run_dir), "--listen", address, "--insecure"]
    processes = [hosts.start(0, words, folder / "coordinator.log")]
    for index in range(1, workers + 1):
        share = ["--cache-dir", str(folder / f"cache-{index}"), "--threads", "1", "--memory-bytes", str(1 << 30)]
        processes.append(hosts.start(index, ["worker", address, "--insecure", *share], folder / f"worker-{index}.log"))
    try:
        yield processes[0], run_dir
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _wait(condition: Any, coordinator: subprocess.Popen[bytes] | None, log: Path) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > deadline or (coordinator is not None and coordinator.poll() is not None):
            raise RuntimeError(f"the run does not go on; see {log}")
        time.sleep(0.2)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="worker hosts (2)")
    for name, of, default in (
        ("latency", "seconds one way", Road().latency_s),
        ("loss", "share of the packets", Road().loss),
        ("rate", "bits a second each way", Road().rate_bits_per_s),
        ("partition", "seconds for which the coordinator is cut off", Road().partition_s),
    ):
        parser.add_argument(f"--{name}", type=float, default=default, help=f"{of} ({default:g})")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    folder = Path(tempfile.mkdtemp(prefix="dipaco-hosts-"))
    try:
        check_allowed()
        road = Road(arguments.latency, arguments.loss, arguments.rate, arguments.partition)
        outcome = carry_out(folder, arguments.workers, road)
    except NotHere as missing:
        print(f"not on this machine: {missing}", file=sys.stderr)
        return 1
    if outcome.equal:
        shutil.rmtree(folder)
    print(json.dumps({**asdict(outcome), "digest_equal": outcome.equal}, indent=2))
    return 0 if outcome.equal else 1


if __name__ == "__main__":
    sys.exit(main())
