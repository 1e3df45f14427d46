"""Does a law fitted to small models, each trained three lengths, foretell a larger one?

python launch.py scaling experiments/ladder.py --png=ladder.png
"""

from gptjax.study.spec import Study

WIDTHS, STEPS = (32, 48, 64, 96, 128), (150, 300, 600)
SHAPES = {f"{width} wide, {steps} steps": {"model.width": width, "train.steps": steps}
          for width in WIDTHS for steps in STEPS}  # fmt: skip
BASELINE = "64 wide, 300 steps"  # the recipe itself

STUDY = Study(
    hypothesis="The loss follows E + A/N^a + B/D^b (Hoffmann et al. 2022): fitted to widths up to "
    "128, it foretells width 192 after 600 steps within 0.03 nats/token.",
    base="configs/ablation.py",
    baseline=BASELINE,
    arms={name: settings for name, settings in SHAPES.items() if name != BASELINE},
    # One learning rate for all widths; every length has a whole schedule of its own.
    settings={"model.parametrisation": "mup", "model.mup_base_width": 64},
    seeds=1,
    equal="nothing",
)
