"""The module of the backprop twin on DeepSpeed's ``PipelineModule``."""

from __future__ import annotations

from deepspeed.pipe import PipelineModule

from ds_al.partition.plan import explicit


class TwinModule(PipelineModule):
    """DeepSpeed's module with one more ``partition_method``: ``"cuts:2,5"``, the first layers of the later stages."""

    def _partition_layers(self, method: str = "uniform") -> None:
        if not method.startswith("cuts:"):
            super()._partition_layers(method)
            return
        self.parts = explicit(method, layers=len(self._layer_specs), stages=self.num_stages)
        stage = self._topo.get_coord(self.global_rank).pipe
        self._set_bounds(start=self.parts[stage], stop=self.parts[stage + 1])
