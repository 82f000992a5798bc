"""Ranks on one machine, each in a network namespace of its own: links as slow as one likes.

The parent calls `run_ranks`; the switch and the ranks are children in namespaces that end with
them, so that nothing is left behind and the machine's own network is never touched. A rank limits
what it sends with `limit`.

Without delay the switch is the kernel's bridge; with delay it is
`forward` (the kernel's netem is often missing), which takes part of a core. Needs Linux, `unshare`,
`ip` and `tc`, and root or unprivileged user namespaces; for delay /dev/net/tun.
Not covered: loss, jitter, limits on what a rank receives.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import shutil
import struct
import subprocess
import sys
import threading
import time
import traceback
from collections import deque
from pathlib import Path

from nexus_ds.errors import LayoutError

NETWORK = "10.77.0."
DEVICE = "eth0"  # of a rank, in its namespace
PORT = 29500  # free in a new namespace
TOOLS = ("unshare", "ip", "tc")
TUN = Path("/dev/net/tun")

# From linux/if_tun.h: calls of ioctl, flags of TUNSETIFF, flags of TUNSETOFFLOAD.
TUNSETIFF = 0x400454CA
TUNSETOFFLOAD = 0x400454D0
TAP = 0x0002
NO_PACKET_INFO = 0x1000
OFFLOAD_HEADER = 0x4000
# left to the device: 64 KiB travel in one piece, as over veth
CHECKSUM = 1
SEGMENTATION_4 = 2
SEGMENTATION_6 = 4

HEADER = 10  # bytes of struct virtio_net_hdr before a frame
ADDRESS = 6  # bytes of a hardware address; a frame begins with its receiver's, then its sender's
FRAME = 66_000  # bytes of the longest frame and its header
PACKET = 131_072  # bytes; a burst smaller than a packet of 64 KiB makes the kernel cut and lose it
BURST_SECONDS = 0.002  # of a fast link: a smaller bucket runs dry between two ticks of the kernel


def _own_namespace() -> list[str]:
    user = [] if os.geteuid() == 0 else ["--map-root-user"]
    return ["unshare", *user, "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]


def check(delay: float = 0.0) -> None:
    """Raise LayoutError with the reason where limited links can't be made.

    `delay`: seconds that they are to have, or none.
    """
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        raise LayoutError(
            f"limited links need {', '.join(TOOLS)}; not found: {', '.join(missing)} "
            "(packages util-linux, iproute2)"
        )
    # one of everything that a run makes, in a namespace that goes at once
    attempt = (
        "ip link add veth0 type veth peer name veth1"
        " && ip link add switch type bridge"
        " && tc qdisc add dev veth0 root tbf rate 1mbit burst 10kb latency 1s"
    )
    found = subprocess.run([*_own_namespace(), "sh", "-c", attempt], capture_output=True, text=True)
    if found.returncode:
        raise LayoutError(
            "limited links need network namespaces with veth, bridge and tbf, as root or with "
            "unprivileged user namespaces (sysctl kernel.unprivileged_userns_clone=1); found: "
            f"{found.stderr.strip()}"
        )
    if delay:
        _check_taps()


def _check_taps() -> None:
    attempt = [*_own_namespace(), "ip", "tuntap", "add", "port0", "mode", "tap"]
    reason = "no such file"
    if TUN.exists():
        found = subprocess.run(attempt, capture_output=True, text=True)
        if not found.returncode:
            return
        reason = found.stderr.strip()
    raise LayoutError(
        f"links with delay need {TUN}, readable and writable (modprobe tun; in a container "
        f"--device {TUN}); found: {reason}; without delay it is not needed"
    )


def limit(speed: float) -> None:
    """Limit what this rank sends from now on to `speed` bytes a second.

    The queue holds those of a second: none is lost.
    """
    burst = max(PACKET, int(BURST_SECONDS * speed))
    # tc's token bucket filter; its rates are in bits, its bursts in bytes
    bucket = ["tbf", "rate", f"{8 * speed:.0f}bit", "burst", str(burst), "latency", "1s"]
    subprocess.run(["tc", "qdisc", "replace", "dev", DEVICE, "root", *bucket], check=True)


def sent() -> int:
    """Return the bytes that this rank has sent, headers and acknowledgements included."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    line = next(line for line in lines if f"{DEVICE}:" in line)
    # eight columns of what was received come first; see proc(5)
    return int(line.split(":")[1].split()[8])


def run_ranks(
    module: str,
    arguments: list[str],
    world: int,
    timeout: float,
    delay: float = 0.0,
) -> None:
    """Run `python -m module arguments` as `world` ranks on limited links.

    They have the variables that a launcher sets.

    Args:
        module: each rank's program.
        arguments: its arguments.
        world: how many ranks.
        timeout: seconds for all of them.
        delay: seconds from rank to rank, one way.

    Raises:
        LayoutError: namespaces or taps are not allowed, a rank failed or it took longer than
            `timeout`.
    """
    check(delay)
    program = [sys.executable, "-m", __name__]
    words = [*_own_namespace(), *program, str(world), str(delay), module, *arguments]
    try:
        done = subprocess.run(
            words,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=timeout,
        )
    except subprocess.TimeoutExpired as error:
        raise LayoutError(
            f"the ranks were not done after {timeout:.0f} s; use fewer steps or faster links"
        ) from error
    if done.returncode:
        raise LayoutError(f"a rank failed; its last words:\n{done.stdout[-2000:]}")


def _wait_for_namespace(pid: int) -> None:
    # `unshare` has it a moment after it was started; a cable plugged in before would end here
    while os.readlink(f"/proc/{pid}/ns/net") == os.readlink("/proc/self/ns/net"):
        time.sleep(0.01)


def _plug(rank: int, pid: int) -> None:
    """Give a rank's namespace a cable to the kernel's switch."""
    port = f"port{rank}"
    for words in (
        f"link add {port} type veth peer name {DEVICE} netns {pid}",
        f"link set {port} master switch",
        f"link set {port} up",
    ):
        subprocess.run(["ip", *words.split()], check=True)


def _tap(rank: int, pid: int) -> int:
    """Give a rank's namespace a device; return where its frames are read and written."""
    port = f"port{rank}"
    tap = os.open(TUN, os.O_RDWR)
    # struct ifreq: name, flags, and what is left of its 40 bytes
    request = struct.pack("16sH22x", port.encode(), TAP | NO_PACKET_INFO | OFFLOAD_HEADER)
    fcntl.ioctl(tap, TUNSETIFF, request)
    fcntl.ioctl(tap, TUNSETOFFLOAD, CHECKSUM | SEGMENTATION_4 | SEGMENTATION_6)
    subprocess.run(["ip", "link", "set", port, "netns", str(pid), "name", DEVICE], check=True)
    return tap


Queues = dict[int, deque[tuple[float, bytes]]]
"""Of each tap: when a frame is due (time.monotonic), and the frame."""


def forward(taps: list[int], delay: float) -> None:
    """Carry frames between taps, each `delay` seconds after it came, until all taps are gone.

    A frame goes to the tap that its receiver has sent from before, or else to all others.

    Args:
        taps: file descriptors; a read returns a frame after `HEADER` bytes.
        delay: seconds.
    """
    seen: dict[bytes, int] = {}  # hardware address: tap
    queues: Queues = {tap: deque() for tap in taps}
    while queues:
        for tap in select.select(list(queues), [], [], _until_due(queues))[0]:
            frame = _read(tap)
            if frame is None:
                del queues[tap]
                continue
            address = frame[HEADER:]
            receiver = address[:ADDRESS]
            sender = address[ADDRESS : 2 * ADDRESS]
            seen[sender] = tap
            others = [seen[receiver]] if receiver in seen else set(queues) - {tap}
            for other in others:
                # one whose rank has ended is known, but gone
                if other in queues:
                    queues[other].append((time.monotonic() + delay, frame))
        _deliver(queues)


def _until_due(queues: Queues) -> float | None:
    """Return the seconds until the next frame is to be delivered; None: none is waiting."""
    first = [queue[0][0] for queue in queues.values() if queue]
    return max(0.0, min(first) - time.monotonic()) if first else None


def _read(tap: int) -> bytes | None:
    """Return the next frame of a tap that `select` has named; None where its rank has ended."""
    try:
        return os.read(tap, FRAME) or None
    except OSError:
        return None


def _deliver(queues: Queues) -> None:
    """Write all frames whose time has come."""
    for tap, queue in queues.items():
        while queue and queue[0][0] <= time.monotonic():
            # a rank whose device is not up receives nothing, as on a real switch
            with contextlib.suppress(OSError):
                os.write(tap, queue.popleft()[1])


def _carry(taps: list[int], delay: float) -> None:
    try:
        forward(taps, delay)
    except Exception:
        traceback.print_exc()
        # not sys.exit, which ends this thread alone: the ranks would wait until the time limit
        os._exit(1)


def _connect(pids: list[int], delay: float) -> None:
    """Join the namespaces of the ranks: by its bridge or, with delay, `forward`."""
    for pid in pids:
        _wait_for_namespace(pid)
    if not delay:
        for words in ("link add switch type bridge", "link set switch up"):
            subprocess.run(["ip", *words.split()], check=True)
        for rank, pid in enumerate(pids):
            _plug(rank, pid)
        return
    taps = [_tap(rank, pid) for rank, pid in enumerate(pids)]
    # How late a sleeping thread may wake, in ns; a thread inherits it. The default is 50 us.
    Path("/proc/self/timerslack_ns").write_text("1", encoding="utf-8")
    # so does it this: ranks that compute must not make the network slow
    with contextlib.suppress(PermissionError):
        os.nice(-10)
    threading.Thread(target=_carry, args=(taps, delay), daemon=True).start()


def join(rank: int) -> None:
    """Wait for this rank's cable and switch it on."""
    while subprocess.run(["ip", "link", "show", DEVICE], capture_output=True).returncode:
        time.sleep(0.01)
    for words in (
        "link set lo up",
        f"addr add {NETWORK}{rank + 1}/24 dev {DEVICE}",
        f"link set {DEVICE} up",
    ):
        subprocess.run(["ip", *words.split()], check=True)


def _switch(world: int, delay: float, module: str, arguments: list[str]) -> int:
    """Start the ranks, connect them and wait for them; the first that fails ends all."""
    common = os.environ | {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": f"{NETWORK}1",
        "MASTER_PORT": str(PORT),
        # gloo would take the first device that has an address: the loopback
        "GLOO_SOCKET_IFNAME": DEVICE,
    }
    command = ["unshare", "--net", sys.executable, "-m", module, *arguments]
    ranks = []
    for rank in range(world):
        own = common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        ranks.append(subprocess.Popen(command, env=own))
    _connect([process.pid for process in ranks], delay)
    while any(process.poll() is None for process in ranks):
        if any(process.poll() for process in ranks):
            # this process's namespace ends with it, and the other ranks with that
            return 1
        time.sleep(0.1)
    return int(any(process.returncode for process in ranks))


if __name__ == "__main__":
    sys.exit(_switch(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3], sys.argv[4:]))
