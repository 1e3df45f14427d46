"""Do adapters of rank 4 suffice? SmolLM2 learns a little of Shakespeare's plays.

python launch.py study experiments/lora_rank.py --from=models/smollm2
"""

from gptjax.study.spec import Settings, Study


def rank(r: int) -> Settings:
    """Adapters of every matrix of the blocks, scaled by 32 / r as in the paper named below."""
    return {"train.trainable": "lora", "train.lora_rank": r, "train.lora_alpha": 32.0}


STUDY = Study(
    hypothesis=(
        "On 4,096 tokens of plays adapters of rank 4, and of rank 1 as well, reach the held-out loss "
        "of full fine-tuning within 0.02 nats/token, each at its best of three rates: so little text "
        "needs little capacity (Schulman et al. 2025, LoRA Without Regret)."
    ),
    base="configs/base.py",
    baseline="all weights",
    arms={"rank 1": rank(1), "rank 4": rank(4), "rank 16": rank(16)},
    settings={
        "model.context": 128,
        "data.batch_size": 2,
        "train.steps": 16,
        "optim.schedule": "linear",
        "optim.warmup_steps": 2,
        "optim.final_lr_fraction": 0.0,
        "optim.weight_decay": 0.0,
        "train.log_every": 4,
        "train.keep_checkpoints": 1,
        "eval.max_tokens": 2048,
        "sample.max_new_tokens": 30,
    },
    tune={"optim.peak_lr": (2e-5, 1e-4, 5e-4)},
    seeds=3,
    smallest=0.02,
)
