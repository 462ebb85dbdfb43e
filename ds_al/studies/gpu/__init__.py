"""What a machine with one GPU shows, in one command and within ten minutes: ``make gpu``.

    packages  what has to be installed, and what of it is missing; imports nothing else
    machine   the GPU; imports PyTorch alone
    study     the parts with their settings
    parts     runs parts, each in a process of its own, under its own time limit; finished ones are kept
    checks    tests marked ``cuda``, a row per test
    cost      what the engine costs: processor time, kernels, share of the time that the GPU computes, rho, memory
    accuracy  VGG and ResNet-18 on CIFAR-10 within a number of minutes, AL beside the twin
    page      the page of the results; picture draws its curves

The command is ``run/gpu.py``.
"""
