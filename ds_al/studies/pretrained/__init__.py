"""Study of fine-tuning: a pretrained encoder by back-propagation and by local learning, on the same texts.

    texts     the data sets, tokenized by the model's own tokenizer
    training  one run: texts, a method, what of the model trains, K, a seed, a learning rate
    plan      the list of runs, the choice of learning rates, and execution of the missing runs
    speed     samples per second and memory per stage on two stages, beside 1F1B
    page      tables and page from the results

The command is ``run/finetune.py``.
"""
