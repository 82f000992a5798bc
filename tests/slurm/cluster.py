"""A real SLURM on this machine for tests: munged, slurmctld and two emulated nodes with fake GPUs,
on loopback only.

    python tests/slurm/cluster.py install           Debian packages, as root
    python tests/slurm/cluster.py check             why the tests can't run here, or nothing

All daemons are children of the process that starts them and end with it. Each node has its own host
name (UTS namespace) but shares the file system; CPUs, memory and GPUs are only claimed.
Not covered: accounting, cgroups, pinning, memory limits; Debian's SLURM 22.05 is what this was
tried with.
"""

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "munged", "unshare")
PACKAGES = ("slurm-wlm", "slurmctld", "slurmd", "slurm-client", "munge")
NODES = ("node1", "node2")
GPUS = 2
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
POLICY = Path("/usr/sbin/policy-rc.d")
HOSTS = Path("/etc/hosts")
FIRST_PORT = 17200  # below the ephemeral ports
DIE_WITH_PARENT = 1  # prctl's PR_SET_PDEATHSIG

CONF = """\
ClusterName=nexustest
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort={controller_port}
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
AuthType=auth/munge
CredType=cred/munge
# a requeued job waits until old credentials are void: cred_expire + 1 s, by default two minutes
AuthInfo=socket={root}/munge.socket,cred_expire=5
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool-%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd-%n.log
SwitchType=switch/none
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
PropagateResourceLimits=NONE
GresTypes=gpu
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=2,bf_interval=2
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
SlurmdTimeout=300
KillWait=10
MinJobAge=86400
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=01:00:00 \\
  State=UP PriorityTier=10 PreemptMode=OFF
PartitionName=low Nodes=ALL MaxTime=INFINITE DefaultTime=01:00:00 \\
  State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
"""


def obstacle():
    """Return why a cluster can't be started here, '' if it can."""
    if os.geteuid() != 0:
        return "starting SLURM daemons needs root"
    missing = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
    if missing:
        found = ", ".join(missing)
        return f"no {found} on this machine; on Debian as root: make test-slurm installs SLURM"
    probe = subprocess.run(["unshare", "--uts", "true"], capture_output=True, text=True)
    if probe.returncode:
        return f"no UTS namespaces for emulated nodes: {probe.stderr.strip()}"
    return ""


def install():
    """Install the packages with apt-get; return why that is impossible, '' when they are there."""
    if not obstacle():
        return ""
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        return "SLURM is not installed, and installing it needs root and apt-get (Debian)"
    own = not POLICY.exists()
    if own:  # keeps the packages from starting daemons of their own
        POLICY.write_text("#!/bin/sh\nexit 101\n", encoding="utf-8")
        POLICY.chmod(0o755)
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    try:
        for command in (["update"], ["install", "--yes", "--no-install-recommends", *PACKAGES]):
            done = subprocess.run(
                ["apt-get", "--quiet=2", *command],
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
            )
            if done.returncode:
                last = done.stderr.strip().splitlines()[-1:]
                return f"apt-get {command[0]} failed: {last or done.returncode}"
    finally:
        if own:
            POLICY.unlink()
    return obstacle()


def free_ports(count):
    """Return TCP ports of loopback that nobody listens on."""
    found, port = [], FIRST_PORT
    while len(found) < count:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.append(port)
        port += 1
    return found


def _end_with_parent():
    ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGTERM)


class Cluster:
    """Starts in `with Cluster(root) as cluster:`; `root` is an empty folder with a short path
    (sockets live in it)."""

    def __init__(self, root):
        self.root, self.daemons = Path(root), []
        outer = ("SLURM", "SBATCH_", "SRUN_", "SALLOC_", "MASTER_", "NEXUS_")
        clean = {
            k: v
            for k, v in os.environ.items()
            if not k.startswith(outer) and k not in ("RANK", "WORLD_SIZE")
        }
        # Node names lead to loopback; gloo must not look for another interface.
        self.env = {
            **clean,
            "PATH": PATH,
            "SLURM_CONF": str(self.root / "slurm.conf"),
            "GLOO_SOCKET_IFNAME": "lo",
        }
        self.hosts_line = f"127.0.0.1 {' '.join(NODES)} # nexus-slurm-test {self.root}\n"

    def _configure(self):
        for name in ("state", *(f"spool-{node}" for node in NODES)):
            (self.root / name).mkdir()
        ports = free_ports(1 + len(NODES))
        # SLURM accepts only device files as GPUs; these are /dev/null under another name.
        devices = [self.root / f"gpu{index}" for index in range(GPUS)]
        for path in devices:
            os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        rows = [
            f"NodeName={node} NodeHostname={node} NodeAddr=127.0.0.1 Port={port} "
            "CPUs=16 Boards=1 SocketsPerBoard=1 "
            f"CoresPerSocket=16 ThreadsPerCore=1 RealMemory=100000 Gres=gpu:{GPUS} State=UNKNOWN"
            for node, port in zip(NODES, ports[1:], strict=True)
        ]
        text = CONF.format(
            root=self.root,
            host=socket.gethostname(),
            controller_port=ports[0],
            nodes="\n".join(rows),
        )
        (self.root / "slurm.conf").write_text(text, encoding="utf-8")
        gres = [f"NodeName={node} Name=gpu File={path}" for node in NODES for path in devices]
        (self.root / "gres.conf").write_text(
            "\n".join(["AutoDetect=off", *gres]) + "\n", encoding="utf-8"
        )
        (self.root / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n", encoding="utf-8")
        key = self.root / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        self.root.chmod(0o755)
        with HOSTS.open("a", encoding="utf-8") as file:
            file.write(self.hosts_line)

    def _daemon(self, name, *command):
        log = (self.root / f"{name}.out").open("ab")
        process = subprocess.Popen(
            command,
            env=self.env,
            cwd=self.root,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            preexec_fn=_end_with_parent,
            start_new_session=True,
        )
        self.daemons.append((name, process))

    def __enter__(self):
        try:
            self._configure()
            munge = ("munged", "--foreground", "--force", f"--key-file={self.root}/munge.key")
            self._daemon(
                "munged",
                *munge,
                f"--socket={self.root}/munge.socket",
                f"--pid-file={self.root}/munged.pid",
                f"--seed-file={self.root}/munged.seed",
                "--num-threads=2",
            )
            self._until(lambda: (self.root / "munge.socket").exists(), 60, "munged did not start")
            self._daemon("slurmctld", "slurmctld", "-D", "-i", "-f", self.env["SLURM_CONF"])
            for node in NODES:
                named = ("unshare", "--uts", "sh", "-c", 'hostname "$0"; exec "$@"', node)
                self._daemon(node, *named, "slurmd", "-D", "-N", node, "-f", self.env["SLURM_CONF"])
            self._until(lambda: self.node_states() == {"idle"}, 240, "the nodes did not come up")
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_):
        self.stop()

    def _until(self, condition, seconds, what):
        deadline = time.monotonic() + seconds
        while not condition():
            dead = [name for name, process in self.daemons if process.poll() is not None]
            if dead or time.monotonic() > deadline:
                logs = [
                    path.read_text(errors="replace")[-2000:]
                    for path in sorted(self.root.glob("*.out"))
                ]
                logs += [
                    path.read_text(errors="replace")[-2000:]
                    for path in sorted(self.root.glob("*.log"))
                ]
                raise RuntimeError(
                    f"{what} (ended: {', '.join(dead) or 'none'})\n" + "\n".join(logs)
                )
            time.sleep(0.1)

    def run(self, *command, check=True, **more):
        """Run a SLURM command; return its standard output."""
        more = {"cwd": self.root, "env": self.env, "timeout": 60, **more}
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, **more
        )
        if check and done.returncode:
            raise RuntimeError(
                f"{' '.join(map(str, command))}: exit {done.returncode}\n{done.stdout}{done.stderr}"
            )
        return done.stdout + ("" if check else done.stderr)

    def node_states(self):
        """Return the set of node states, as sinfo prints them."""
        return set(self.run("sinfo", "--noheader", "--Node", "--format=%T", check=False).split())

    def stop(self):
        """End all jobs, then the daemons."""
        if any(name == "slurmctld" and process.poll() is None for name, process in self.daemons):
            with contextlib.suppress(Exception):
                self.run("scancel", "--user=root", check=False, timeout=20)
                deadline = time.monotonic() + 25
                while (
                    self.run("squeue", "--noheader", timeout=10).strip()
                    and time.monotonic() < deadline
                ):
                    time.sleep(0.3)
        for _, process in reversed(self.daemons):
            if process.poll() is None:
                process.terminate()
        for _, process in self.daemons:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        text = HOSTS.read_text(encoding="utf-8")
        # in place: it may be a bind mount
        HOSTS.write_text(text.replace(self.hosts_line, ""), encoding="utf-8")


if __name__ == "__main__":
    reason = install() if sys.argv[1:] == ["install"] else obstacle()
    if reason:
        print(f"SLURM tests are skipped: {reason}")
