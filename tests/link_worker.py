"""One rank that times a small and a large message to the other rank on a limited link (not a test).

python -m link_worker OUT.json SPEED BYTES

OUT.json: {round_trip: least seconds of 20, seconds: until a message of BYTES, at SPEED bytes a
second, is answered}.
"""

import json
import os
import socket
import sys
import time
from pathlib import Path

from nexus_ds.experiments.benchmarks import network
from nexus_ds.launch import end


def connection(rank):
    """Return a connection between rank 0, which listens, and rank 1."""
    if rank == 0:
        with socket.create_server((os.environ["MASTER_ADDR"], network.PORT)) as server:
            found = server.accept()[0]
    else:
        found = None
        while found is None:
            try:
                found = socket.create_connection(
                    (os.environ["MASTER_ADDR"], network.PORT), timeout=10
                )
            except OSError:
                time.sleep(0.05)  # rank 0 does not listen yet
    found.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    found.settimeout(60)
    return found


def receive(link, size):
    while size:
        size -= len(link.recv(min(size, 1 << 20)))


def timed(link, rank, size):
    """Send `size` bytes from rank 0, which are answered by one; return the seconds."""
    started = time.perf_counter()
    if rank == 0:
        link.sendall(bytes(size))
        receive(link, 1)
    else:
        receive(link, size)
        link.sendall(b"1")
    return time.perf_counter() - started


def main():
    out, speed, size, rank = (
        Path(sys.argv[1]),
        float(sys.argv[2]),
        int(sys.argv[3]),
        int(os.environ["RANK"]),
    )
    network.join(rank)
    network.limit(speed)
    with connection(rank) as link:
        trips = [timed(link, rank, 1) for _ in range(20)]
        seconds = timed(link, rank, size)
    if rank == 0:
        out.write_text(json.dumps({"round_trip": min(trips), "seconds": seconds}))


if __name__ == "__main__":
    main()
    end(0)
