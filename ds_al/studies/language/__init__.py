"""The study of causal language models: perplexity of every objective at every exit, beside the backprop twin.

    corpus   texts to tokens: a small BPE, trained on the texts themselves, and pieces of equal length
    run     one run: a method, K, a seed, a learning rate, a number of steps
    plan     which runs are run, how settings are chosen, what is done already
    page     tables, picture and text of what is there

The command is ``run/perplexity.py``.
"""
