"""Direct preference optimisation of a trained model, on pairs of a chosen and a rejected answer.

Source:   Rafailov et al. 2023 (arXiv:2305.18290), whose beta of 0.1 it has; the rate is for a model of
          some 100M parameters.
Command:  python launch.py data pairs pairs.jsonl --tokenizer=models/smollm2 --out=data/pairs
          python launch.py train --from=models/smollm2 --config=configs/dpo.py \\
              --config.data.sources="('data/pairs',)" --workdir=runs/preferred
Expected: the first loss is 0.6931, ln 2.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    c = base.get_config()
    c.data.packing, c.data.batch_size = "pairs", 16
    c.train.objective = "dpo"

    o = c.optim
    o.peak_lr, o.schedule, o.warmup_steps = 1e-6, "linear", 20
    o.final_lr_fraction, o.weight_decay = 0.0, 0.0

    c.train.steps = 200
    c.train.eval_every = c.train.checkpoint_every = 50
    c.sample.prompt = "What is the capital of France?"
    return c
