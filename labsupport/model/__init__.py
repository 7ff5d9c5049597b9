"""A causal language model: loading it, its blocks and linears, its text, its evaluation, bitsandbytes to compare with, files."""
