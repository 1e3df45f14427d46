"""Text -> token store -> batch(seed, step)."""

from gptjax.data.batches import PACKING, Batches, describe
from gptjax.data.prepare import prepare
from gptjax.data.sources import DATASETS, open_source
from gptjax.data.store import Store

__all__ = ["DATASETS", "PACKING", "Batches", "Store", "describe", "open_source", "prepare"]
