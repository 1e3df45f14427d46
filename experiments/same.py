"""A/A: the same recipe three times. Whatever is found here is a false alarm."""

from gptjax.study.spec import Study

STUDY = Study(
    hypothesis="Runs of one recipe do not differ but for their seeds.",
    base="configs/ablation.py",
    arms={"again": {"seed": 100}, "once more": {"seed": 200}},
)
