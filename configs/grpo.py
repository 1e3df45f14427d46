"""Reinforcement learning of a trained model: it answers prompts, and a reward says what that is worth.

Source:   GRPO, Shao et al. 2024 (arXiv:2402.03300), without its divergence from a reference, as in
          DAPO (Yu et al. 2025, arXiv:2503.14476); 8 answers a prompt. The rate is for a model of some
          100M parameters, not tuned.
Command:  python launch.py data prompts questions.jsonl --tokenizer=models/smollm2 --out=data/questions
          python launch.py train --from=models/smollm2 --config=configs/grpo.py \\
              --config.data.sources="('data/questions',)" --workdir=runs/rewarded
Expected: the metrics `reward` and, of held-out prompts, `val_reward` rise. `reward` below is that of
          exact answers; name your own by --config.train.reward=FILE.py:FUNCTION.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import base


def reward(row: dict[str, Any], answer: str) -> float:
    """1 if the last word of the answer is that of the row's `answer`, but for marks, else 0."""
    said, right = (str(text).replace(",", "").split() for text in (answer, row["answer"]))
    marks = ".:;!?$*()"
    return float(bool(said) and said[-1].strip(marks) == right[-1].strip(marks))


def get_config() -> ConfigDict:
    c = base.get_config()
    c.model.context = 512
    c.data.packing, c.data.batch_size, c.data.group = "prompts", 64, 8
    c.train.objective, c.train.beta = "grpo", 0.0
    c.train.reward, c.train.answer_tokens = "configs/grpo.py:reward", 128

    o = c.optim
    o.peak_lr, o.schedule, o.warmup_steps = 1e-6, "constant", 10
    o.b2, o.weight_decay = 0.99, 0.0

    c.train.steps, c.train.log_every = 200, 1
    c.train.eval_every = c.train.checkpoint_every = 50
    c.sample.temperature, c.sample.top_p = 1.0, 1.0
    c.sample.prompt = "How many legs have two dogs?"
    return c
