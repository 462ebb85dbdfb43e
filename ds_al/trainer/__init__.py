"""``ALTrainer``: an interface like transformers' ``Trainer`` for an :class:`~ds_al.engine.ALPipelineEngine`.

    arguments    the supported subset of ``TrainingArguments``
    elsewhere    what to use instead of the others
    reported     arguments as callbacks and loggers read them
    steps        numbers of batches
    batches      collation of data set rows to micro-batches
    callbacks    supported callbacks, and broadcast of their decisions to all ranks
    trainer      the training loop

Callbacks, state, control, outputs and collators are transformers' own. The user guide is ``docs/trainer.md``.
"""
