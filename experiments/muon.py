"""Does Muon beat AdamW when each has its own best learning rate?"""

from gptjax.study.spec import Study

STUDY = Study(
    hypothesis="Muon reaches a lower loss than AdamW in the same number of steps (Jordan et al. 2024).",
    base="configs/ablation.py",
    baseline="adamw",
    arms={"muon": {"optim.optimizer": "muon"}},
    tune={"optim.peak_lr": (2.5e-3, 5e-3, 1e-2, 2e-2, 4e-2)},
)
