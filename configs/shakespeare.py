"""The default: a small GPT on plays of Shakespeare that ship with the package.

Source:   GPT-2's block and vocabulary; sizes chosen for five minutes on two CPU cores.
Command:  make train
          python launch.py train --config=configs/shakespeare.py --workdir=runs/shakespeare
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    c = base.get_config()
    c.optim.loss_vocab_chunk = 8384  # a sixth of 50,304: more than twice as fast on two CPU cores
    c.train.steps = 400
    c.train.eval_every = c.train.checkpoint_every = 100
    return c
