"""The engine below :class:`~ds_al.engine.ALPipelineEngine`: training, evaluation, checkpoints, layers that move."""
