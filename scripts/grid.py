"""Numbers of initial answers and of corrections (Table 1 of the paper).

python scripts/grid.py --config configs/quickstart.yaml --seeds 1 2 3
"""

import sys
from itertools import product

import ablation

if __name__ == "__main__":
    parser = ablation.parser(__doc__, "runs/grid")
    parser.add_argument("--variant", default="EIF", help="variant of all runs")
    parser.add_argument(
        "--n_init", nargs="+", type=int, default=[1, 3, 5], metavar="N", help="numbers of initial answers"
    )
    parser.add_argument(
        "--n_corr", nargs="+", type=int, default=[1, 3, 5], metavar="N", help="numbers of corrections"
    )
    arguments, run_options = parser.parse_known_args()
    systems = {
        f"{arguments.variant}-{n_init}-{n_corr}": [
            *("--algorithm.variant", arguments.variant),
            *("--algorithm.n_init", str(n_init), "--algorithm.n_corr", str(n_corr)),
        ]
        for n_init, n_corr in product(arguments.n_init, arguments.n_corr)
    }
    sys.exit(ablation.run(systems, arguments, run_options))
