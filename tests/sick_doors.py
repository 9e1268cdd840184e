"""Doors as tests/corpus_harness.py drives them, which do what they are told: die, fail, hang, or answer."""

from __future__ import annotations

import json
import os
import signal
import sys
import time

if __name__ == "__main__":
    print('"ready"', flush=True)
    for line in sys.stdin:
        door, request = json.loads(line)
        if door == "die":
            os.kill(os.getpid(), signal.SIGSEGV)
        if door == "raise":
            raise ValueError("a fault of the product")
        if door == "hang":
            time.sleep(1000)
        print(json.dumps(request), flush=True)
