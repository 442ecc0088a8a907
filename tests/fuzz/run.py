"""The command line of the generator: ``python -m tests.fuzz --count 10000 --seed 0``."""

from __future__ import annotations

import argparse
import sys
import time

from fuzz.check import fault
from fuzz.draw import draw


def main(arguments: list[str] | None = None) -> int:
    """Runs programs by consecutive seeds; returns 1 where one has a fault."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--count", type=int, default=1000, help="the number of programs")
    parser.add_argument("--seed", type=int, default=0, help="the seed of the first one")
    parser.add_argument("--most", type=int, default=20, help="the number of faults after which to stop")
    options = parser.parse_args(arguments)
    start, faults = time.perf_counter(), 0
    for number, seed in enumerate(range(options.seed, options.seed + options.count), 1):
        sample = draw(seed)
        said = fault(sample)
        if said is not None:
            faults += 1
            print(f"seed {seed}: {said.strip()}\n{sample}\n", flush=True)
        if faults == options.most:
            break
        if number % 500 == 0:
            print(f"{number} programs, {faults} with a fault, {time.perf_counter() - start:.0f} s", flush=True)
    print(f"{number} programs, {faults} with a fault, {time.perf_counter() - start:.0f} s")
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
