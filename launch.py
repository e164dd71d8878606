#!/usr/bin/env python3
"""jaxvram's one entry point: `python launch.py --config=configs/NAME.py[:VARIANT] [--mode=...] [--config.a.b=value ...]`."""

import sys

from jaxvram.main import main

if __name__ == "__main__":
    sys.exit(main(sys.argv))
