"""The eight variants of STaSC (Table 2 and Figures 2 to 4 of the paper).

python scripts/variants.py --config configs/quickstart.yaml --seeds 1 2 3
"""

import sys

import ablation

from stasc.algorithm import VARIANTS

if __name__ == "__main__":
    parser = ablation.parser(__doc__, "runs/variants")
    parser.add_argument("--variants", nargs="+", default=VARIANTS, metavar="XYZ", help="variants to run")
    arguments, run_options = parser.parse_known_args()
    systems = {variant: ["--algorithm.variant", variant] for variant in arguments.variants}
    sys.exit(ablation.run(systems, arguments, run_options))
