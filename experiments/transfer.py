"""Is the best learning rate of a narrow model that of one four times as wide?"""

from gptjax.study.spec import Study

STUDY = Study(
    hypothesis="Under muP the best of six rates at width 64 is the best at width 256 as well; in "
    "the standard parametrisation it is lower there (Yang et al. 2022, arXiv:2203.03466).",
    base="configs/ablation.py",
    baseline="standard",
    arms={"muP": {"model.parametrisation": "mup", "model.mup_base_width": 64}},
    scales={"64 wide": {"model.width": 64}, "256 wide": {"model.width": 256}},
    settings={"train.steps": 150, "data.batch_size": 8},
    tune={"optim.peak_lr": (1.25e-3, 2.5e-3, 5e-3, 1e-2, 2e-2, 4e-2)},
    seeds=1,
)
