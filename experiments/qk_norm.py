"""Does QK-norm help, and does it help more at a higher learning rate?"""

from gptjax.study.spec import Study

STUDY = Study(
    hypothesis=(
        "QK-norm makes no difference at the usual rate and keeps the run stable at four and "
        "sixteen times that rate (Henry et al. 2020; Wortsman et al. 2023)."
    ),
    base="configs/ablation.py",
    baseline="no QK-norm",
    arms={"QK-norm": {"model.qk_norm": True}},
    scales={f"rate {rate:g}": {"optim.peak_lr": rate} for rate in (5e-3, 2e-2, 8e-2)},
)
