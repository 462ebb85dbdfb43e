"""One training run from a config file: what ``run/train.py`` does."""

from ds_al.experiment.config import ExperimentConfig, experiment_config
from ds_al.experiment.job import Job

__all__ = ["ExperimentConfig", "Job", "experiment_config"]
