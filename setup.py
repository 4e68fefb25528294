"""Compiles the way of a request through the engine (docs/concurrency.md) with mypyc; the rest is in pyproject.toml.

The modules work uncompiled too, at half the speed: SHARE_MANAGER_PURE=1 builds that, for a debugger.
"""

import os
import sys

from mypyc.build import mypycify
from setuptools import Extension, setup

# no task is started and nothing awaited in any of them: mypyc's coroutines are not trio's
COMPILED = [
    "engine/controller/core.py",
    "engine/controller/foresight.py",
    "engine/controller/pipeline.py",
    "engine/controller/stats.py",
    "engine/controller/stream.py",
    "engine/frontend/session.py",
    "engine/ops.py",
    "engine/readiness.py",
    "engine/replica/aio.py",
    "engine/replica/backlog.py",
    "engine/replica/barrier.py",
    "engine/replica/direct.py",
    "engine/replica/exchange.py",
    "engine/replica/executor.py",
    "engine/replica/gate.py",
    "engine/replica/syncer.py",
    "engine/store/chain.py",
    "engine/store/index.py",
    "engine/store/regions.py",
    "engine/wire/frame.py",
]

extensions = [Extension("ganesha._wake", ["ganesha/wake.c"])]
# pip runs this file thrice, and only once to build
if not os.environ.get("SHARE_MANAGER_PURE") and not {"egg_info", "dist_info"} & set(sys.argv):
    # what they import is not there while the package is built, and checked elsewhere
    options = ["--config-file=", "--ignore-missing-imports", "--follow-imports=silent"]
    extensions += mypycify([*options, *COMPILED], group_name="engine", opt_level="2")

setup(ext_modules=extensions)
