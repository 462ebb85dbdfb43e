"""What a machine with one GPU shows, in one command and within ten minutes: ``make gpu``.

    packages  what has to be installed, and what of it is missing; imports nothing else
    machine   the GPU; imports PyTorch alone
    study     the parts with their settings
    cost      what the engine costs: processor time, kernels, share of the time that the GPU computes, rho, memory
    accuracy  VGG and ResNet-18 on CIFAR-10 within a number of minutes, AL beside the twin
    page      the page of the results; picture draws its curves

:mod:`ds_al.studies.parts` runs the parts, and :mod:`ds_al.studies.checks` the tests. The command is ``run/gpu.py``.
"""
