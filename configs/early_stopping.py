"""Early stopping: which versions of every path are measured, on what. Torch-free."""

from __future__ import annotations

from configs.section import PositiveInt, Section


class EarlyStoppingConfig(Section):
    """Keep, for each path, the version of lowest loss on its own part of the `stop` split (DiPaCo, Sec 2.7).

    It selects and never stops training. A path's part is what the newest router gives it; without a router (sharding
    `random` or `all`) every path is measured on the whole split. A re-shard begins anew.
    """

    # Measure a path after every so many phases, and after the last one of every train stage.
    every: PositiveInt = 1
    # Of each token file of the stop split, measured at most; null: all.
    max_sequences: PositiveInt | None = None
