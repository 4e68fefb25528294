"""`python -m tests.fuzz TARGET --seconds N`: one target under atheris (pip install .[fuzz]), guided by coverage.

The exit status is 0 when nothing was found; what was found is written to a file by libFuzzer, and shown.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
import tempfile

import structlog

# what atheris is to watch: all that reads what others say
WATCHED = (
    "engine.client",
    "engine.control",
    "engine.controller",
    "engine.decoding",
    "engine.record",
    "engine.replica",
    "engine.store",
    "engine.wire",
)


def main() -> int:
    """libFuzzer ends its process from within, so it has one of its own, and its files a directory."""
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir="/dev/shm") as home:
        pid = os.fork()
        if pid == 0:
            os.environ["FUZZ_HOME"] = home
            os._exit(fuzz())
        _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def fuzz() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("target", help="frames, messages, record, operation, directory, control, server or replica")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0, help="0: another one every time")
    parser.add_argument("--input", help="a file that was found: try this one only")
    wanted = parser.parse_args()
    try:
        atheris = importlib.import_module("atheris")
    except ImportError:
        print("atheris is not installed: pip install .[fuzz]", file=sys.stderr)
        return 2
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    with atheris.instrument_imports(include=list(WATCHED)):
        targets = importlib.import_module("tests.fuzz.targets").TARGETS
    if wanted.target not in targets:
        parser.error(f"there is no target {wanted.target!r}, only {', '.join(targets)}")
    with targets[wanted.target]() as target:
        corpus = tempfile.mkdtemp(dir=os.environ["FUZZ_HOME"])
        limits = ["-max_len=512", "-len_control=0", f"-max_total_time={wanted.seconds}", "-print_final_stats=1"]
        seed = [f"-seed={wanted.seed}"] if wanted.seed else []
        atheris.Setup([sys.argv[0], *limits, *seed, wanted.input or corpus], target)
        atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
