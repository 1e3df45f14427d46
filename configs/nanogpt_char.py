"""nanoGPT's CPU recipe: a character model of tinyshakespeare.

Source:   github.com/karpathy/nanoGPT, README, "I only have a macbook", which prints a
          validation loss of 1.88:
              train.py config/train_shakespeare_char.py --device=cpu --compile=False
              --eval_iters=20 --log_interval=1 --block_size=64 --batch_size=12 --n_layer=4
              --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0
          One byte is one character of this ASCII text; the byte vocabulary has 257 rows where
          nanoGPT's has the 65 that occur. Also different: GELU is the tanh form, windows do
          not overlap within an epoch, and all of the held-out text is scored, not a sample.
Data:     its input.txt of 1,115,394 bytes, which does not ship here:
          python launch.py data input.txt --out=data/tinyshakespeare --tokenizer=bytes
Command:  python launch.py train --config=configs/nanogpt_char.py --workdir=runs/nanogpt_char
Expected: 1.887 after 2,000 steps; nanoGPT's own code gives 1.898 by the same measure. A peak rate of
          2e-3 gives 1.817.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(store: str = "data/tinyshakespeare") -> ConfigDict:
    c = base.get_config()
    m = c.model
    m.vocab_size = 257
    m.context, m.layers, m.heads, m.width = 64, 4, 4, 128
    m.bias = False

    c.optim.peak_lr, c.optim.final_lr_fraction = 1e-3, 0.1
    c.optim.warmup_steps = 100
    c.optim.b2 = 0.99
    c.data.sources = (store,)
    c.data.tokenizer = "bytes"
    c.data.batch_size = 12
    c.train.steps = 2000
    c.train.log_every = 50
    c.train.checkpoint_every = 1000
    c.eval.batch_size = 256
    c.sample.prompt = "\n"
    c.sample.max_new_tokens = 400
    return c
