"""Targets of tests/fuzz.py, guided by coverage: `python tests/guided.py TARGET SECONDS [CORPUS]`.

atheris (libFuzzer) makes bytes, out of which the same hostile files are drawn as in
tests/fuzz.py; bytes that reach a branch of the package not seen before are kept in the folder
CORPUS and changed further, by a later start too. `all` takes one target after the other.

atheris has wheels for Linux on x86-64 alone, so it is in no requirements: `make fuzz` installs it.
"""

import argparse
import os
import random
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path

import atheris
import drawing

with atheris.instrument_imports(include=["nexus_ds"], enable_loader_override=False):
    import fuzz

LONGEST = 4096  # bytes, out of which one input is drawn


def attempts(target, tally):
    """Return a function of bytes that tries the input drawn out of them."""
    names = sorted(target.inputs)

    def attempt(content):
        chance = drawing.Given(content)
        name = names[chance.below(len(names))]
        tally.keep(target, name, target.inputs[name].make(chance))

    return attempt


def first_bytes(folder):
    """Put random bytes into an empty corpus: a short input is drawn out of zeros."""
    folder.mkdir(parents=True, exist_ok=True)
    if not any(folder.iterdir()):
        for number in range(50):
            content = random.Random(number).randbytes(LONGEST // 4)
            (folder / f"first{number}").write_bytes(content)


def guided(name, seconds, corpus):
    """Fuzz one target; end this process with 1 if something was found, else with 0."""
    first_bytes(corpus)
    tally, out = fuzz.Tally(), os.dup(1)
    with atheris.instrument_imports(include=["nexus_ds"], enable_loader_override=False):
        entered = fuzz.opened(name)
        target = entered.__enter__()
    attempt = attempts(target, tally)
    start = time.monotonic()

    def over():
        os.dup2(out, 1)
        sys.stdout = sys.__stdout__
        sound = fuzz.report(name, tally, time.monotonic() - start)
        entered.__exit__(None, None, None)
        sys.stdout.flush()
        # libFuzzer never returns.
        os._exit(not sound)

    def one(content):
        if time.monotonic() - start > seconds:
            over()
        # Of what draws, where nested values are nested again; what readers raise is a finding.
        with suppress(drawing.Unusable, RecursionError):
            attempt(content)

    # What readers print, and libFuzzer; its own limits of memory and time are out of the way.
    log = os.open(corpus.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    words = [sys.argv[0], "-rss_limit_mb=0", "-timeout=86400", "-len_control=0"]
    words += [f"-max_len={LONGEST}", f"-artifact_prefix={corpus.parent}/", str(corpus)]
    atheris.Setup(words, one)
    atheris.Fuzz()


def alone(name, seconds, corpus):
    """Run one target in a fork: its limits are its own, and an abort leaves the others alone."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        guided(name, seconds, corpus)
    except BaseException:
        traceback.print_exc()
    os._exit(2)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("target", choices=[*fuzz.TARGETS, "all"])
    parser.add_argument("seconds", type=float, help="for each target")
    parser.add_argument("corpus", type=Path, nargs="?", default=fuzz.OUT / "corpus")
    args = parser.parse_args()
    names = fuzz.TARGETS if args.target == "all" else [args.target]
    codes = {name: alone(name, args.seconds, args.corpus / name) for name in names}
    for name, code in codes.items():
        if code not in (0, 1):
            print(f"{name}: ended by {code}", flush=True)
    return int(any(codes.values()))


if __name__ == "__main__":
    sys.exit(main())
