"""The default: a small GPT on Shakespeare's works, which ship with the package.

Source:   what won the studies of experiments/ (RoPE, SwiGLU, QK-norm at a high rate, Muon), and a
          vocabulary of 2,048 tokens that was trained on the training part of the works: GPT-2's
          would hold nearly all parameters. Sized for ten minutes of CPU time; see
          "The default recipe" in experiments/README.md.
Command:  make train
          python launch.py train --config=configs/shakespeare.py --workdir=runs/shakespeare
Expected: 2.19 bits/byte on the held-out play.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    c = base.get_config()
    c.data.sources = ("shakespeare_complete",)
    c.data.tokenizer, c.model.vocab_size = "shakespeare2k", 2048
    c.data.batch_size = 4

    m = c.model
    m.position, m.feedforward, m.norm, m.bias = "rope", "swiglu", "rmsnorm", False
    m.qk_norm, m.init = True, "zero_out"

    o = c.optim
    o.optimizer, o.peak_lr = "muon", 2e-2
    o.schedule, o.final_lr_fraction = "linear", 0.0

    c.train.steps = 1800
    c.train.eval_every = c.train.checkpoint_every = 450
    c.sample.max_new_tokens = 200
    return c
