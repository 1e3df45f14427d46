"""Which activation of the feed-forward is best when all have the same number of parameters?"""

from gptjax.study.spec import Study

STUDY = Study(
    hypothesis=(
        "At equal parameters gated activations (SwiGLU, GeGLU) and squared ReLU beat GELU, which "
        "beats ReLU (Shazeer 2020; So et al. 2021)."
    ),
    base="configs/ablation.py",
    baseline="gelu",
    arms={
        "relu": {"model.feedforward": "relu"},
        "relu2": {"model.feedforward": "relu2"},
        "swiglu": {"model.feedforward": "swiglu"},
        "geglu": {"model.feedforward": "geglu"},
    },
    equal="parameters",
)
