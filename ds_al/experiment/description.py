"""``Description``: what a config asks for, checked as far as that is possible before data are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ds_al.config.associated_learning import al_config
from ds_al.config.base import with_scheduler_steps
from ds_al.config.settings import Settings
from ds_al.config.sizes import BATCH, MICRO_BATCH, MICRO_BATCHES
from ds_al.experiment.budget import BatchSizes
from ds_al.experiment.config import BLOCK, ExperimentConfig, check_partition, experiment_config
from ds_al.experiment.forms import Form, form_of
from ds_al.experiment.layout import Layout
from ds_al.experiment.recipes import with_recipe
from ds_al.optim import names, schedules

RESOLVED = "resolved"
"""Key that the run folder adds to its copy of the config; a config that has it runs as it did without."""


@dataclass(frozen=True, kw_only=True)
class Description:
    """One run, as its config describes it.

    Attributes:
        config: the whole config, with the settings of its recipe.
        experiment: its block ``"experiment"``.
        form: the form of the run (:mod:`ds_al.experiment.forms`).
        layout: stage and replica of this process.
        sizes: samples and micro-batches of a batch.
    """

    config: dict[str, Any]
    experiment: ExperimentConfig
    form: Form
    layout: Layout
    sizes: BatchSizes

    @classmethod
    def of(cls, config: Mapping[str, Any], *, world: int = 1, rank: int = 0) -> Description:
        """Reads a config.

        Args:
            config: DeepSpeed's keys and both blocks; it may be the ``config.json`` of a run.
            world: number of processes.
            rank: rank of this process.

        Raises:
            ALConfigError: a key is unknown, cannot be honoured, or does not fit the others or the number of processes.
        """
        experiment_config(config)
        al_config(config)
        config = with_recipe({key: value for key, value in config.items() if key != RESOLVED})
        experiment = experiment_config(config)
        form = form_of(al_config(config))
        layout = form.layout(num_stages=experiment.num_stages, world=world, rank=rank)
        form.check(experiment)
        check_partition(experiment)
        sizes = BatchSizes.of(config, form, replicas=layout.replicas)
        form.check_batch(sizes.per_replica, stages=layout.stages)
        found = cls(config=config, experiment=experiment, form=form, layout=layout, sizes=sizes)
        engine = found.engine_config(steps=1)
        settings = Settings.of(engine, is_al=form.has_exits, module="run", replicas=layout.replicas)
        names.check(engine, settings.al)
        schedules.check(engine)
        return found

    def engine_config(self, *, steps: int) -> dict[str, Any]:
        """Returns DeepSpeed's keys and the block of the method, with the sizes of this run.

        Args:
            steps: steps of the LR schedule in the whole run.
        """
        config = {key: value for key, value in self.config.items() if key != BLOCK}
        sizes = self.sizes
        config |= {BATCH: sizes.samples, MICRO_BATCH: sizes.micro_batch, MICRO_BATCHES: sizes.per_replica}
        config |= self.form.checkpoint_defaults(config)
        return with_scheduler_steps(config, steps)
