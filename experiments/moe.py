"""Do eight experts, of which each token passes through two, beat one feed-forward at equal FLOPs?"""

from gptjax.study.spec import Study

# Two experts of half the width have the products of the dense feed-forward; the router's are 1% more.
EXPERTS = {"model.feedforward": "gelu_experts", "model.ff_dim": 128}

STUDY = Study(
    hypothesis=(
        "At equal training FLOPs eight experts, of which each token passes through two of half the "
        "width, beat the dense feed-forward (Fedus et al. 2021; Jiang et al. 2024). Dropping what is "
        "beyond 1.25 times an even share, and balancing by a bias in place of a loss (DeepSeek-V3), "
        "change no more than 0.01."
    ),
    base="configs/ablation.py",
    baseline="dense",
    arms={
        "experts": EXPERTS,
        "capacity 1.25": EXPERTS | {"model.capacity_factor": 1.25},
        "balanced by a bias": EXPERTS | {"model.balance_rate": 1e-3, "model.balance_loss": 0.0},
    },
    equal="flops",
)
