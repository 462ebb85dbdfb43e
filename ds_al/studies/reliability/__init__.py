"""What is promised of a job whose ranks, numbers, disks and machines fail, and what came of it: ``make reliability``.

    study   the parts with their settings and promises
    faults  a fault at every instruction and in every call, into the ranks of a job
    job     the script of that job
    kills   a run that is killed again and again, and goes on with other numbers of stages
    inputs  the tables of tests/robustness
    page    the page of the results

A part is a function that is called with its limit of seconds and tells rows by
:func:`ds_al.studies.parts.tell_row`. Each row says by ``outcome`` what came of one promise: ``ok``, ``lost``, ``hung``
or ``wrong``, and by ``failure`` why. :mod:`ds_al.studies.parts` runs the parts; the command is ``run/reliability.py``.
"""
