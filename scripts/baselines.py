"""STaR, Self-Refine and Reflexion (section 2 of the paper). SC is the variant FIE, see variants.py.

python scripts/baselines.py --config configs/quickstart.yaml --seeds 1 2 3
"""

import sys
from pathlib import Path

import ablation

OVERLAYS = Path(__file__).parents[1] / "configs" / "baselines"
BASELINES = {"STaR": "star.yaml", "SelfRefine": "self_refine.yaml", "Reflexion": "reflexion.yaml"}

if __name__ == "__main__":
    arguments, run_options = ablation.parser(__doc__, "runs/baselines").parse_known_args()
    systems = {name: ["--config", str(OVERLAYS / overlay)] for name, overlay in BASELINES.items()}
    sys.exit(ablation.run(systems, arguments, run_options))
