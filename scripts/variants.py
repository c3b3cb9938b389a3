"""The eight variants of STaSC (Table 2 and Figures 2 to 4 of the paper).

python scripts/variants.py --config configs/quickstart.yaml --seeds 1 2 3
"""

import sys
from itertools import product

import ablation

VARIANTS = ["".join(letters) for letters in product("FE", "IN", "FE")]

if __name__ == "__main__":
    parser = ablation.parser(__doc__, "runs/variants")
    parser.add_argument("--variants", nargs="+", default=VARIANTS, metavar="XYZ", help="which of them")
    given, others = parser.parse_known_args()
    systems = {variant: ["--algorithm.variant", variant] for variant in given.variants}
    sys.exit(ablation.run(systems, given, others))
