"""One dial: the depth d decides everything else, by the formulas below.

Source:   nanochat's dial (Karpathy 2025) with Chinchilla's ratio (Hoffmann et al. 2022).
              width         D = 64 d, heads of 64
              kv heads      the most of 1 to 4 that divide the d heads
              parameters    N = 12 d D^2 = 49,152 d^3: the blocks, as if no heads were shared
              tokens        20 N
              batch         2^16 tokens, doubled for each doubling of D beyond 768
              peak rate     3e-4 sqrt(768 / D)
              weight decay  0.1; warm-up 2% of the steps
Command:  python launch.py train --config=configs/depth.py:12 --workdir=DIR
Hardware: d = 4 in hours on CPU; d = 12 in hours on one GPU; d = 24 wants eight. Not run here.
"""

import math

from ml_collections import ConfigDict

from configs import modern


def get_config(depth: str = "12") -> ConfigDict:
    if not depth.isdecimal() or not int(depth):
        raise ValueError(f"depth {depth!r} is not a whole number above 0, such as 4, 12 or 24")
    d = int(depth)
    c = modern.get_config()
    m = c.model
    m.layers, m.width, m.heads = d, 64 * d, d
    m.kv_heads = next(k for k in (4, 3, 2, 1) if d % k == 0)

    tokens = 20 * 12 * d * m.width**2
    batch = 2 ** (16 + max(0, math.floor(math.log2(m.width / 768))))
    c.data.batch_size = batch // m.context
    c.train.accumulation = 1
    c.train.steps = max(200, round(tokens / batch))
    c.optim.peak_lr = 3e-4 * math.sqrt(768 / m.width)
    c.optim.warmup_steps = round(0.02 * c.train.steps)
    c.train.eval_every = c.train.checkpoint_every = max(100, c.train.steps // 20)
    return c
