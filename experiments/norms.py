"""Does the kind of normalisation, or its place, matter at four layers?"""

from gptjax.study.spec import Study

STUDY = Study(
    hypothesis=(
        "RMSNorm and a norm without parameters are as good as LayerNorm; post-norm is worse than "
        "pre-norm, and sandwich-norm no better."
    ),
    base="configs/ablation.py",
    baseline="layernorm, pre",
    arms={
        "rmsnorm": {"model.norm": "rmsnorm"},
        "parameterfree": {"model.norm": "parameterfree"},
        "post": {"model.norm_placement": "post"},
        "sandwich": {"model.norm_placement": "sandwich"},
    },
)
