"""Ranks on one machine, each in a network namespace of its own, joined by a switch: links as slow
as one likes.

The parent calls `run_ranks`; the switch and the ranks are children in namespaces that end with
them, so that nothing is left behind and the machine's own network is never touched. A rank limits
what it sends with `limit`. Without delay the switch is the kernel's bridge; with delay it is
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
TUNSETIFF, TUNSETOFFLOAD = 0x400454CA, 0x400454D0  # linux/if_tun.h, as the next two lines
TAP, NO_PACKET_INFO, OFFLOAD_HEADER = 0x0002, 0x1000, 0x4000
# left to the device: 64 KiB travel in one piece, as over veth
CHECKSUM, SEGMENTATION_4, SEGMENTATION_6 = 1, 2, 4
HEADER = 10  # bytes of struct virtio_net_hdr before a frame
FRAME = 66_000  # bytes of the longest frame and its header


def _own_namespace() -> list[str]:
    user = [] if os.geteuid() == 0 else ["--map-root-user"]
    return ["unshare", *user, "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]


def check(delay: float = 0.0) -> None:
    """Raise LayoutError where limited links, with a delay of `delay` seconds or none, can't be
    made, with the reason."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        raise LayoutError(
            f"limited links need {', '.join(TOOLS)}; not found: {', '.join(missing)} (packages util-linux, iproute2)"
        )
    attempt = "ip link add veth0 type veth peer name veth1 && ip link add switch type bridge && tc qdisc add dev veth0 root tbf rate 1mbit burst 10kb latency 1s"
    found = subprocess.run([*_own_namespace(), "sh", "-c", attempt], capture_output=True, text=True)
    if found.returncode:
        raise LayoutError(
            "limited links need network namespaces with veth, bridge and tbf, as root or with unprivileged user namespaces "
            f"(sysctl kernel.unprivileged_userns_clone=1); found: {found.stderr.strip()}"
        )
    if delay:
        _check_taps()


def _check_taps() -> None:
    attempt = [*_own_namespace(), "ip", "tuntap", "add", "port0", "mode", "tap"]
    found = subprocess.run(attempt, capture_output=True, text=True) if TUN.exists() else None
    if found is None or found.returncode:
        raise LayoutError(
            f"links with delay need {TUN}, readable and writable (modprobe tun; in a container --device {TUN}); found: "
            f"{found.stderr.strip() if found else 'no such file'}; without delay it is not needed"
        )


def limit(speed: float) -> None:
    """Limit what this rank sends from now on to `speed` bytes a second. The queue holds those of a
    second: none is lost."""
    burst = max(
        131072, int(0.002 * speed)
    )  # smaller than a packet of 64 KiB, and the kernel cuts it up and loses parts
    shape = ["tbf", "rate", f"{8 * speed:.0f}bit", "burst", str(burst), "latency", "1s"]
    subprocess.run(["tc", "qdisc", "replace", "dev", DEVICE, "root", *shape], check=True)


def sent() -> int:
    """Return the bytes that this rank has sent, headers and acknowledgements included."""
    line = next(
        line for line in Path("/proc/net/dev").read_text().splitlines() if f"{DEVICE}:" in line
    )
    return int(line.split(":")[1].split()[8])


def run_ranks(
    module: str, arguments: list[str], world: int, timeout: float, delay: float = 0.0
) -> None:
    """Run `python -m module arguments` as `world` ranks on limited links, with a launcher's
    variables.

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
    words = [
        *_own_namespace(),
        sys.executable,
        "-m",
        __name__,
        str(world),
        str(delay),
        module,
        *arguments,
    ]
    try:
        done = subprocess.run(
            words, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=timeout
        )
    except subprocess.TimeoutExpired as error:
        raise LayoutError(
            f"the ranks were not done after {timeout:.0f} s; use fewer steps or faster links"
        ) from error
    if done.returncode:
        raise LayoutError(f"a rank failed; its last words:\n{done.stdout[-2000:]}")


def _wait_for_namespace(pid: int) -> None:
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
    """Give a rank's namespace a device whose frames are read from and written to the returned file
    descriptor."""
    port = f"port{rank}"
    tap = os.open(TUN, os.O_RDWR)
    fcntl.ioctl(
        tap, TUNSETIFF, struct.pack("16sH22x", port.encode(), TAP | NO_PACKET_INFO | OFFLOAD_HEADER)
    )
    fcntl.ioctl(tap, TUNSETOFFLOAD, CHECKSUM | SEGMENTATION_4 | SEGMENTATION_6)
    subprocess.run(["ip", "link", "set", port, "netns", str(pid), "name", DEVICE], check=True)
    return tap


def forward(taps: list[int], delay: float) -> None:
    """Carry frames between taps, each `delay` seconds after it came, until all taps are gone.

    A frame goes to the tap that its receiver has sent from before, or else to all others.

    Args:
        taps: file descriptors; a read returns a frame after `HEADER` bytes.
        delay: seconds.
    """
    seen: dict[bytes, int] = {}  # hardware address: tap
    queues: dict[int, deque[tuple[float, bytes]]] = {tap: deque() for tap in taps}
    while queues:
        due = min((queue[0][0] for queue in queues.values() if queue), default=None)
        wait = None if due is None else max(0.0, due - time.monotonic())
        for tap in select.select(list(queues), [], [], wait)[0]:
            frame = _read(tap)
            if frame is None:
                del queues[tap]
                continue
            receiver, sender = frame[HEADER : HEADER + 6], frame[HEADER + 6 : HEADER + 12]
            seen[sender] = tap
            for other in [seen[receiver]] if receiver in seen else set(queues) - {tap}:
                if other in queues:
                    queues[other].append((time.monotonic() + delay, frame))
        _deliver(queues)


def _read(tap: int) -> bytes | None:
    """Return the next frame of a tap that `select` has named; None where its rank has ended."""
    try:
        return os.read(tap, FRAME) or None
    except OSError:
        return None


def _deliver(queues: dict[int, deque[tuple[float, bytes]]]) -> None:
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
        os._exit(1)  # or the ranks would wait for each other until the time limit


def _connect(pids: list[int], delay: float) -> None:
    """Join the namespaces of the ranks by the kernel's bridge or, with delay, by `forward` in a
    thread."""
    for pid in pids:
        _wait_for_namespace(pid)
    if not delay:
        subprocess.run(
            "ip link add switch type bridge && ip link set switch up", shell=True, check=True
        )
        for rank, pid in enumerate(pids):
            _plug(rank, pid)
        return
    taps = [_tap(rank, pid) for rank, pid in enumerate(pids)]
    # a thread inherits it; the default is 50 us
    Path("/proc/self/timerslack_ns").write_text("1", encoding="utf-8")
    with contextlib.suppress(PermissionError):
        os.nice(-10)  # so does it this: ranks that compute must not make the network slow
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
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
    }
    common |= {"MASTER_ADDR": f"{NETWORK}1", "MASTER_PORT": str(PORT), "GLOO_SOCKET_IFNAME": DEVICE}
    ranks = [
        subprocess.Popen(
            ["unshare", "--net", sys.executable, "-m", module, *arguments],
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank), "CUDA_VISIBLE_DEVICES": ""},
        )
        for rank in range(world)
    ]
    _connect([process.pid for process in ranks], delay)
    while any(process.poll() is None for process in ranks):
        if any(process.poll() for process in ranks):
            return 1  # the namespace ends, and the others with it
        time.sleep(0.1)
    return int(any(process.returncode for process in ranks))


if __name__ == "__main__":
    sys.exit(_switch(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3], sys.argv[4:]))
