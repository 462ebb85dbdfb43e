"""From what a project has to associated learning, and back to a plain model.

    layers         a layer list of DeepSpeed's ``PipelineModule``: ``ALPipelineModule.from_layers``
    hugging_face   a model of ``transformers``: ``ds_al.from_pretrained``
    export         weights that ``transformers`` loads, or a program: ``ds_al.export``

Both ways in end in :func:`ds_al.convert.assemble.al_layers`: blocks with the activation that leaves each group of
them, and the head, become f and b; g and h are made new. The page for users is ``docs/from_your_model.md``.
"""
