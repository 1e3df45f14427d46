"""The share of a job's time that trains, simulated under failures, against the interval of saves.

    python docs/goodput.py --save=0.5 --complete=6 --restart=30 --png=docs/goodput.png

Failures: Llama 3 405B had 419 unexpected interruptions in 54 days on 16,384 GPUs (arXiv:2407.21783,
section 3.3.4). Their times were not published, so they are drawn as a Poisson process of that rate.
A save is begun every INTERVAL seconds of training, costs the loop SAVE seconds, and is complete
COMPLETE seconds later, until which the one before counts. A failure costs what was trained since
the last complete save was begun, and RESTART seconds: to see it, to start again, compile and
restore. Failures strike during a restart as well.
"""

import argparse
import math
import sys
from pathlib import Path

import numpy as np

FAILURES, DAYS = 419, 54
RATE = FAILURES / (DAYS * 86_400)  # a second
INTERVALS = (30, 60, 120, 180, 300, 600, 900, 1800, 3600, 7200)  # seconds
RESTARTS = (1, 6, 20)  # times the measured one, in the picture


def simulate(
    interval: float, save: float, complete: float, restart: float, seconds: float, seed: int = 0,
    rate: float = RATE,
) -> float:  # fmt: skip
    """The share of so many seconds that was trained and not lost.

    A cycle is `interval` seconds of training and `save` of saving; between two failures cycles
    follow each other. Of those that ended, the last counts only if it ended `complete` seconds
    before the failure.
    """
    rng = np.random.default_rng(seed)
    clock = kept = 0.0
    while clock < seconds:
        up = rng.exponential(1 / rate)
        trains = up - restart  # the restart comes first, and may be struck itself
        kept += math.floor(max(trains - complete, 0.0) / (interval + save)) * interval
        clock += up
    return kept / clock


def expected(
    interval: float, save: float, complete: float, restart: float, rate: float = RATE
) -> float:
    """The same, in closed form: the sum over n of P(up >= restart + complete + n cycles)."""
    cycle = math.exp(-rate * (interval + save))
    return interval * rate * math.exp(-rate * (restart + complete)) * cycle / (1 - cycle)


def main(*words: str) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--save", type=float, required=True, help="seconds of the loop")
    parser.add_argument("--complete", type=float, required=True, help="seconds until it counts")
    parser.add_argument("--restart", type=float, required=True, help="seconds after a failure")
    parser.add_argument("--png", type=Path, required=True)
    a = parser.parse_args(words)
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for times in RESTARTS:
        restart = times * a.restart
        shares = [100 * simulate(i, a.save, a.complete, restart, 2000 * 86_400) for i in INTERVALS]
        axes.plot(INTERVALS, shares, "o-", label=f"restart {restart:.0f} s")
        best = max(zip(shares, INTERVALS, strict=True))
        print(f"restart {restart:.0f} s: {best[0]:.2f}% with a save every {best[1]} s")
        for interval, share in zip(INTERVALS, shares, strict=True):
            print(f"  every {interval:>5} s  {share:.2f}%")
    axes.axhline(97, color="grey", lw=0.8, ls=":")
    axes.set(
        xscale="log", xlabel="seconds between saves", ylabel="time that trains, %", ylim=(50, 100)
    )
    axes.set_title(f"{FAILURES} failures in {DAYS} days; a save costs {a.save:g} s", fontsize=10)
    axes.legend(frameon=False)
    figure.savefig(a.png, dpi=120)


if __name__ == "__main__":
    main(*sys.argv[1:])
