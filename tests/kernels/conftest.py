"""Triton kernels without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest


@pytest.fixture
def interpret():
    """Run a script under Triton's interpreter: in a process of its own, since Triton reads TRITON_INTERPRET when a
    kernel is defined. What the script prints is returned, with what it complained about."""
    if find_spec("triton") is None:
        pytest.skip("Triton is not installed")

    def run(script: str) -> tuple[str, str]:
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
        return done.stdout.strip(), done.stderr

    return run
