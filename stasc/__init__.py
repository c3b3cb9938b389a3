"""Self-Taught Self-Correction: a small language model learns from its own corrections."""

import sys

from stasc.house import OwnPackages

__version__ = "0.2.0"

sys.meta_path.insert(0, OwnPackages)
