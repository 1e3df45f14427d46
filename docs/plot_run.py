"""Draws the curves of a run: python docs/plot_run.py runs/shakespeare docs/shakespeare.png

Needs matplotlib.
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from gptjax.records import read_metrics


def main(workdir: str, picture: str) -> None:
    lines = read_metrics(workdir)
    config = json.loads((Path(workdir) / "config.json").read_bytes())
    tokens = config["data"]["batch_size"] * config["model"]["context"]
    figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
    for key, label, style in (("loss", "training", "-"), ("val_loss", "held out", "o-")):
        points = [(line["step"] * tokens / 1e3, line[key]) for line in lines if key in line]
        axis.plot(*zip(*points, strict=True), style, label=label, markersize=5, linewidth=1.5)
    last = [line for line in lines if "val_loss" in line][-1]
    axis.annotate(
        f"perplexity {last['val_perplexity']:.1f}, {last['val_bits_per_byte']:.3f} bits/byte",
        (last["step"] * tokens / 1e3, last["val_loss"]),
        xytext=(-8, 24),
        textcoords="offset points",
        ha="right",
        arrowprops={"arrowstyle": "-", "color": "gray"},
    )
    axis.set(xlabel="thousand tokens", ylabel="loss, nats per token", title=Path(workdir).name)
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(picture, dpi=130)


if __name__ == "__main__":
    main(*sys.argv[1:])
