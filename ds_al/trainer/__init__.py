"""``ALTrainer``: the shape of transformers' ``Trainer`` around an :class:`~ds_al.engine.ALPipelineEngine`.

    arguments    what of ``TrainingArguments`` has a meaning here
    batches      a data set's rows to micro-batches
    callbacks    which callbacks fit, and how all ranks come to decide the same
    trainer      the loop

Callbacks, state, control, outputs and collators are transformers' own. The page for users is ``docs/trainer.md``.
"""
