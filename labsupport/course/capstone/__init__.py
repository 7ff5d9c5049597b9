"""The capstone: the best held-out perplexity of the course model under a byte budget. `labs capstone DIR` scores a checkpoint.

rules.py      what counts, and what is refused
texts.py      what is scored on: held-out modules whose names have been changed
worker.py     the process that reads a submission and evaluates it
scoring.py    starts it, judges what comes back, places it
baselines.py  what it is placed among: `labs capstone --baselines`
reference.py  an answer that is better than every uniform configuration
"""
