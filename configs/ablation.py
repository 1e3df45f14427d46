"""Where the studies of experiments/ start from: a byte-level GPT that one core trains in a minute.

Source:   GPT-2's block (Radford et al. 2019) at a size for comparisons on a CPU: what holds here
          need not hold at another scale.
Command:  python launch.py train --config=configs/ablation.py
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    c = base.get_config()
    m = c.model
    m.vocab_size = 264  # 257 bytes and end-of-text, rounded up to a multiple of 8
    m.context, m.layers, m.heads, m.width = 128, 4, 4, 64
    # With learned positions or at gpt2's scale of initial values so short a run hardly gets
    # beyond the statistics of letter pairs.
    m.position, m.init = "rope", "fan_in"

    c.optim.peak_lr = 5e-3
    c.optim.warmup_steps = 40
    c.data.tokenizer = "bytes"
    c.data.batch_size = 16
    c.train.steps = 300
    c.train.log_every = 10
    c.train.eval_every = 60
    c.train.checkpoint_every = 100
    c.eval.batch_size = 128
    c.sample.max_new_tokens = 200
    return c
