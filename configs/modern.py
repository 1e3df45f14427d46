"""A modern decoder: RoPE, RMSNorm, SwiGLU, grouped-query attention, QK-norm, no biases, untied.

Source:   the common ground of Llama 3 (Grattafiori et al. 2024) and Qwen3 (Yang et al. 2025),
          with Qwen3's QK-norm. Size, vocabulary, rate and length are those of gpt2.py:124m;
          the RoPE base stays at 10,000, as the context is 1,024 tokens, not their thousands.
Command:  python launch.py train --config=configs/modern.py --workdir=DIR
Hardware: one GPU of 80 GB; not run here.
"""

from ml_collections import ConfigDict

from configs import gpt2


def get_config() -> ConfigDict:
    c = gpt2.get_config("124m")
    m = c.model
    m.position = "rope"
    m.norm = "rmsnorm"
    m.norm_eps = 1e-6
    m.feedforward = "swiglu"
    m.kv_heads = 4
    m.qk_norm = True
    m.bias = False
    m.tied = False
    m.init = "fan_in"
    return c
