"""Which position encoding learns fastest at this size, tokens being equal?"""

from gptjax.study.spec import Study

STUDY = Study(
    hypothesis=(
        "In a short run relative positions (RoPE, ALiBi) beat absolute ones (learned, sinusoidal), "
        "and a model without positions comes last."
    ),
    base="configs/ablation.py",
    baseline="rope",
    arms={
        "alibi": {"model.position": "alibi"},
        "learned": {"model.position": "learned"},
        "sinusoidal": {"model.position": "sinusoidal"},
        "none": {"model.position": "none"},
    },
)
