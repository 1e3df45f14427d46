"""GPT-2: 124m, 355m, 774m or 1558m.

Source:   Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", table 2;
          AdamW, batch and length follow nanoGPT's reproduction of the 124M (its
          config/train_gpt2.py). The paper says no more of the rates than that each was tuned:
          124m has nanoGPT's, the others have those of GPT-3's models of their size.
          Dropout is 0, as usual where no text is seen twice. GPT-2's biases stay, which
          nanoGPT leaves out; its 50,257 tokens stand in 50,304 rows, as there.
Command:  python launch.py train --config=configs/gpt2.py:124m --workdir=DIR \\
              --config.data.sources="('/path/to/openwebtext_store',)"
Hardware: the full length is meant for 8 GPUs of 80 GB or a TPU slice; not run here.
Expected: 124m on OpenWebText after 600,000 steps: a loss of 2.85 (nanoGPT's README).
"""

from ml_collections import ConfigDict

from configs import base

# size: (layers, width, heads, peak learning rate)
SIZES = {
    "124m": (12, 768, 12, 6.0e-4),
    "355m": (24, 1024, 16, 3.0e-4),
    "774m": (36, 1280, 20, 2.5e-4),
    "1558m": (48, 1600, 25, 2.0e-4),
}


def get_config(size: str = "124m") -> ConfigDict:
    c = base.get_config()
    m = c.model
    m.layers, m.width, m.heads, c.optim.peak_lr = base.pick(SIZES, size)
    m.context = 1024
    m.dtype = "bfloat16"
    m.scan_layers = True
    m.remat = "none" if size == "124m" else "dots"

    c.optim.warmup_steps = 2000
    c.optim.loss_vocab_chunk = 8384  # a sixth of 50,304
    c.data.batch_size = 480  # x 1,024 tokens: about half a million a step
    c.train.accumulation = 5
    c.train.steps = 600_000
    c.train.eval_every = 1000
    c.train.checkpoint_every = 1000
    c.eval.batch_size = 32
    c.eval.max_tokens = 1_048_576
    return c
