"""Runs a module of the benchmarks where Triton interprets its kernels."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from .environment import ROOT


def rows(module: str, op: str, device: str, *more: str) -> list[dict[str, Any]]:
    """What `python -m module op device …` prints as JSON.

    In a process of its own, because the interpreter has to be chosen before triton is imported; on a GPU there is none.
    """
    environment = dict(os.environ) | ({"TRITON_INTERPRET": "1"} if device == "cpu" else {})
    command = [sys.executable, "-W", "ignore", "-m", module, op, device, *more]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{module}: " + (result.stderr.strip().splitlines() or ["it ended without a word"])[-1])
    return json.loads(result.stdout)
