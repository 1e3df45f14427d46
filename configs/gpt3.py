"""The GPT-3 family: 125m, 350m, 760m, 1.3b, 2.7b, 6.7b, 13b or 175b.

Source:   Brown et al. 2020, "Language Models are Few-Shot Learners", table 2.1 and appendix B:
          sizes, batch in tokens and learning rate; 300 billion tokens, warm-up over the first
          375 million, cosine to 10%, Adam (0.9, 0.95), clip 1, weight decay 0.1.
          Deviations: the paper's alternating sparse layers are sliding windows of 256 tokens,
          its batch ramp is left out, and the decay spans the whole run, not 260 billion tokens.
          Batches are rounded to multiples of 64 rows. Two lines of the table do not multiply
          out: 1.3b has 16 heads of 128, where the paper prints 24, and 13b's width is
          5,120 = 40 x 128, where it prints 5,140.
Command:  python launch.py train --config=configs/gpt3.py:6.7b --workdir=DIR --config.mesh.fsdp=64
Hardware: TPU pods and GPU clusters; shapes and shardings are tested, the runs were not made.
"""

from ml_collections import ConfigDict

from configs import base

# size: (layers, width, heads, tokens a batch, peak learning rate)
SIZES = {
    "125m": (12, 768, 12, 0.5e6, 6.0e-4),
    "350m": (24, 1024, 16, 0.5e6, 3.0e-4),
    "760m": (24, 1536, 16, 0.5e6, 2.5e-4),
    "1.3b": (24, 2048, 16, 1.0e6, 2.0e-4),
    "2.7b": (32, 2560, 32, 1.0e6, 1.6e-4),
    "6.7b": (32, 4096, 32, 2.0e6, 1.2e-4),
    "13b": (40, 5120, 40, 2.0e6, 1.0e-4),
    "175b": (96, 12288, 96, 3.2e6, 0.6e-4),
}


def get_config(size: str = "125m") -> ConfigDict:
    c = base.get_config()
    m = c.model
    m.layers, m.width, m.heads, batch_tokens, c.optim.peak_lr = base.pick(SIZES, size)
    m.context = 2048
    m.windows = (None, 256)
    m.dtype = "bfloat16"
    m.scan_layers = True
    m.remat = "dots"

    c.data.batch_size = round(batch_tokens / m.context / 64) * 64  # divisible by 64 devices
    c.train.steps = round(300e9 / (c.data.batch_size * m.context))
    c.optim.warmup_steps = round(375e6 / (c.data.batch_size * m.context))
    c.optim.loss_vocab_chunk = 8384
    c.train.eval_every = 1000
    c.train.checkpoint_every = 1000
    c.eval.batch_size = 64
    c.eval.max_tokens = 1_048_576
    return c
