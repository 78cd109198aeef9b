"""The settings of an experiment and of a training."""
