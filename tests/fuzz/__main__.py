"""Runs random programs against the oracle; the tests' folder is where they find it."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from fuzz.run import main

sys.exit(main())
