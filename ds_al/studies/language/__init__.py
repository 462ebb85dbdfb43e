"""Study of causal language models: perplexity of every objective at every exit, compared with the backprop twin.

    corpus    tokenizes the texts with a small BPE trained on them, and cuts sequences of equal length
    training  one run: a method, K, a seed, a learning rate, a number of steps
    plan      the list of runs, the choice of settings, and execution of the missing runs
    page      tables, figure and page from the results

The command is ``run/perplexity.py``.
"""
