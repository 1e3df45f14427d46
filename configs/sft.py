"""A pretrained model taught by dialogues (supervised fine-tuning).

Source:   Ouyang et al. 2022 (arXiv:2203.02155), step 1. The rate is a choice of ours for models of
          some hundred million parameters, not tuned. Scored are the assistant's tokens alone
          (`data dialogues`), by the weights of the store; dialogues are packed whole, and do not
          see each other.
Command:  python launch.py data dialogues talks.jsonl --out=data/talks --tokenizer=models/smollm2
          python launch.py train --config=configs/sft.py --from=models/smollm2 \\
              --config.data.sources="('data/talks',)" --workdir=runs/taught
Hardware: as the model: `config` tells the memory.
Expected: depends on the dialogues. `ask --workdir=runs/taught` shows what became of it.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    c = base.get_config()
    c.model.context = 1024
    c.data.packing = "whole"
    c.optim.peak_lr = 5e-5
    c.train.steps = 500
    return c
