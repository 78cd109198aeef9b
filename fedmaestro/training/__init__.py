"""Maestro on one machine: ordered sampling, group lasso, progressive shrinking, and the accuracy–cost curve.

Source: Horváth et al., "Maestro: Uncovering Low-Rank Structures via Trainable Decomposition", ICML 2024.
"""

from fedmaestro.config.training import TrainingConfig
from fedmaestro.training.run import TrainingRun, train

__all__ = ["TrainingConfig", "TrainingRun", "train"]
