"""Ranks on one machine, each in a network namespace of its own, joined by a switch: links as slow as one likes.

The parent calls `run_ranks`; the switch and the ranks are children in namespaces that end with them, so that nothing is left
behind and the machine's own network is never touched. A rank limits what it sends with `limit`.
Needs Linux, `unshare`, `ip` and `tc`, and root or unprivileged user namespaces.
Not covered: delay (the kernel's netem is often missing), loss, limits on what a rank receives.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from nexus_ds.errors import LayoutError

NETWORK = "10.77.0."
DEVICE = "eth0"  # of a rank, in its namespace
PORT = 29500  # free in a new namespace
TOOLS = ("unshare", "ip", "tc")


def _own_namespace() -> list[str]:
    user = [] if os.geteuid() == 0 else ["--map-root-user"]
    return ["unshare", *user, "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]


def check() -> None:
    """Raise LayoutError where limited links can't be made, with the reason."""
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


def limit(speed: float) -> None:
    """Limit what this rank sends from now on to `speed` bytes a second. The queue holds those of a second: none is lost."""
    burst = max(
        131072, int(0.002 * speed)
    )  # smaller than a packet of 64 KiB, and the kernel cuts it up and loses parts
    shape = ["tbf", "rate", f"{8 * speed:.0f}bit", "burst", str(burst), "latency", "1s"]
    subprocess.run(["tc", "qdisc", "replace", "dev", DEVICE, "root", *shape], check=True)


def sent() -> int:
    """Return the bytes that this rank has sent, headers and acknowledgements included."""
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if f"{DEVICE}:" in line)
    return int(line.split(":")[1].split()[8])


def run_ranks(module: str, arguments: list[str], world: int, timeout: float) -> None:
    """Run `python -m module arguments` as `world` ranks on limited links, with a launcher's variables.

    Raises:
        LayoutError: namespaces are not allowed, a rank failed or it took longer than `timeout` seconds.
    """
    check()
    words = [*_own_namespace(), sys.executable, "-m", __name__, str(world), module, *arguments]
    try:
        done = subprocess.run(words, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=timeout)
    except subprocess.TimeoutExpired as error:
        raise LayoutError(f"the ranks were not done after {timeout:.0f} s; use fewer steps or faster links") from error
    if done.returncode:
        raise LayoutError(f"a rank failed; its last words:\n{done.stdout[-2000:]}")


def _plug(rank: int, pid: int) -> None:
    """Give a rank's namespace a cable to the switch."""
    while os.readlink(f"/proc/{pid}/ns/net") == os.readlink("/proc/self/ns/net"):
        time.sleep(0.01)
    port = f"port{rank}"
    for words in (
        f"link add {port} type veth peer name {DEVICE} netns {pid}", f"link set {port} master switch", f"link set {port} up",
    ):  # fmt: skip
        subprocess.run(["ip", *words.split()], check=True)


def join(rank: int) -> None:
    """Wait for this rank's cable and switch it on."""
    while subprocess.run(["ip", "link", "show", DEVICE], capture_output=True).returncode:
        time.sleep(0.01)
    for words in ("link set lo up", f"addr add {NETWORK}{rank + 1}/24 dev {DEVICE}", f"link set {DEVICE} up"):
        subprocess.run(["ip", *words.split()], check=True)


def _switch(world: int, module: str, arguments: list[str]) -> int:
    """Make the switch, start the ranks and wait for them; the first that fails ends all."""
    subprocess.run("ip link add switch type bridge && ip link set switch up", shell=True, check=True)
    common = os.environ | {"OMP_NUM_THREADS": "1", "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    common |= {"MASTER_ADDR": f"{NETWORK}1", "MASTER_PORT": str(PORT), "GLOO_SOCKET_IFNAME": DEVICE}
    ranks = [
        subprocess.Popen(
            ["unshare", "--net", sys.executable, "-m", module, *arguments],
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank), "CUDA_VISIBLE_DEVICES": ""},
        )
        for rank in range(world)
    ]
    for rank, process in enumerate(ranks):
        _plug(rank, process.pid)
    while any(process.poll() is None for process in ranks):
        if any(process.poll() for process in ranks):
            return 1  # the namespace ends, and the others with it
        time.sleep(0.1)
    return int(any(process.returncode for process in ranks))


if __name__ == "__main__":
    sys.exit(_switch(int(sys.argv[1]), sys.argv[2], sys.argv[3:]))
