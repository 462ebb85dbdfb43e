"""The engine below :class:`~ds_al.engine.ALPipelineEngine`: training of a stage, evaluation, and its parts."""
