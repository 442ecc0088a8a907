"""Takes one meta-gradient of each workload, for a profiler to look at."""

from __future__ import annotations

import torch

from .setting import parser, setting


def main() -> None:
    """Runs the workloads."""
    options = parser(__doc__)
    options.add_argument("workloads", nargs="+")
    given = options.parse_args()
    where = setting(given)
    for chosen in map(where.workload, given.workloads):
        losses = where.learner(chosen).backward(chosen.draw().to(where.device)).losses
        if where.device != "cpu":
            torch.cuda.synchronize()
        assert losses.isfinite().all()


if __name__ == "__main__":
    main()
