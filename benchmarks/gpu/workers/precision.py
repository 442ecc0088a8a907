"""Measures time and error of a meta-gradient by the CUDA executor, with each precision of products."""

from __future__ import annotations

from functools import partial

from metafast.executors.native.cuda import PRECISIONS
from metafast.verification.agreement import agreement

from .setting import parser, setting
from .smoke import answer, arrays
from .timing import host_ms

SECONDS = 0.5


def main() -> None:
    """Adds a result for each workload and precision."""
    options = parser(__doc__)
    options.add_argument("workloads", nargs="+")
    given = options.parse_args()
    where = setting(given)
    for name in given.workloads:
        chosen = where.workload(name)
        truth, tasks = where.oracle(chosen), chosen.draw().to(where.device)
        for precision in PRECISIONS:
            learner = where.learner(chosen, precision=precision)
            error = agreement(arrays(answer(learner, tasks)), truth).gradient
            taken = host_ms(partial(learner.backward, tasks), where.device, where.seconds(SECONDS))
            where.results.add(name, precision=precision, gradient_error=error, eager_ms=taken)


if __name__ == "__main__":
    main()
