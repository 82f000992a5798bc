"""A process that has imported what ranks import and forks them on request (not a test): seconds of
imports are paid once.

python rank_server.py SOCKET      ends with the process that holds its standard input

A request is one line of JSON {arguments, environment, folder, umask, file_limit, out}; the answers
are lines: the process's id, later its wait status. A forked rank ends as one that was started does
(launch.end). What ranks of one test share here and not in reality is the seed of their hashes, so
the order of sets; train.py is started afresh for that reason.
"""

import gc
import importlib
import json
import os
import resource
import runpy
import selectors
import socket
import sys

MODULES = (
    "torch.distributed",
    "nexus_ds.runtime.loop",
    "nexus_ds.runtime.states",
    "nexus_ds.runtime.export",
    "nexus_ds.checkpoint.build",
    "transformers.models.qwen2_moe.modeling_qwen2_moe",
    "transformers.models.llama.modeling_llama",
    "parity",
)


def become(request, imported):
    """Turn this process into the rank that was asked for, up to its first line; `imported` are
    variables of the modules'."""
    output = os.open(request["out"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout.reconfigure(line_buffering=True)
    os.environ.clear()
    os.environ.update(imported | request["environment"])
    os.chdir(request["folder"])
    os.umask(request["umask"])
    resource.setrlimit(resource.RLIMIT_FSIZE, request["file_limit"])
    sys.argv = request["arguments"]


def serve(path):
    """Fork a rank for each request; return in the rank, end with who started this."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    waiting, ranks = selectors.DefaultSelector(), {}
    for source in (sys.stdin, listener):
        waiting.register(source, selectors.EVENT_READ)
    print("ready", flush=True)
    while True:
        for key, _ in waiting.select(timeout=0.02):
            if key.fileobj is sys.stdin:
                os._exit(0)
            asker, _ = listener.accept()
            request = json.loads(asker.makefile().readline())
            pid = os.fork()
            if pid == 0:
                for connection in (listener, asker, *ranks.values()):
                    connection.close()
                waiting.close()
                return request
            ranks[pid] = asker
            asker.sendall(f"{pid}\n".encode())
        for pid in list(ranks):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                with ranks.pop(pid) as asker:
                    asker.sendall(f"{status}\n".encode())


if __name__ == "__main__":
    before = os.environ.copy()
    for module in MODULES:
        importlib.import_module(module)
    gc.freeze()  # a collection in a rank, which DeepSpeed asks for, need not look at all modules
    threads = len(os.listdir("/proc/self/task"))
    assert threads == 1, f"{threads} threads: what is forked would lack all but one"
    become(
        serve(sys.argv[1]),
        {name: value for name, value in os.environ.items() if name not in before},
    )
    sys.path.insert(0, os.path.dirname(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")
