"""GPT-2 on one GPU of 80 GB: 124m or 1558m.

Source:   gpt2.py, whose rates and length stay. A step has 512 rows, 524,288 tokens, as llm.c's
          reproduction of the 124M does; the micro-batch is what fits with little computed twice.
          Both keep all logits. 124m keeps all activations, its layers apart, so that no activation
          is copied into a stack. 1558m keeps its products (remat) and compiles one block for all
          layers: 48 apart take longer to compile, and what then had to go made it slower.
Command:  python launch.py train --config=configs/one_gpu.py:124m --workdir=DIR \\
              --config.data.sources="('/path/to/openwebtext_store',)"
Hardware: one GPU of 80 GB, such as an H100; measured on an H200. `config` tells the memory.
Expected: as gpt2.py. docs/gpu.md: what speed is aimed at, and how it is measured.
"""

from ml_collections import ConfigDict

from configs import base, gpt2

# size: (rows of a micro-batch, layers as one, activations kept)
SIZES = {"124m": (64, False, "none"), "1558m": (16, True, "dots")}


def get_config(size: str = "124m") -> ConfigDict:
    rows, scan_layers, remat = base.pick(SIZES, size)
    c = gpt2.get_config(size)
    c.model.scan_layers, c.model.remat = scan_layers, remat
    c.optim.loss_vocab_chunk = None
    c.data.batch_size = 512
    c.train.accumulation = c.data.batch_size // rows
    return c
