"""Adapters on a pretrained model: LoRA beside every matrix of its blocks.

Source:   Hu et al. 2022 (arXiv:2106.09685); beside all matrices and at some ten times the rate of
          full fine-tuning, as "LoRA Without Regret" has it (Schulman et al. 2025).
Command:  python launch.py train --config=configs/lora.py --from=models/smollm2 \\
              --config.data.sources="('/path/to/store',)" --workdir=runs/tuned
          python launch.py export --workdir=runs/tuned --out=adapters/tuned --adapter

With --config.train.trainable=qlora the matrices beside the adapters are held in 8 bits.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    c = base.get_config()
    c.data.sources = ("shakespeare_complete",)

    c.train.trainable = "lora"
    c.train.lora_rank, c.train.lora_alpha = 8, 16.0

    o = c.optim
    o.peak_lr, o.weight_decay = 1e-3, 0.0
    o.schedule, o.warmup_steps = "constant", 10

    c.train.steps = 200
    c.train.eval_every = c.train.checkpoint_every = 100
    return c
