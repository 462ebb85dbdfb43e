"""Evaluation and prediction through the stages of an :class:`~ds_al.engine.ALPipelineEngine`.

Inference ends with ``h_1``, which the first stage owns. Codes are not sent back to it; instead, once per evaluation,
each stage receives the weights of all earlier ``h`` from its predecessor. They are small and cost a few messages per
stage, whereas codes would cost a message per exit, stage and batch, and would make stages wait for later ones. Each
stage then scores its own exits, so evaluation sends messages forward only. At its end the counts of all stages are
summed.
"""

from ds_al.inference.evaluation import Inference

__all__ = ["Inference"]
