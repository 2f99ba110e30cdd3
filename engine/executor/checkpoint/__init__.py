"""Checkpoints whose weights are quantised in the files: which kinds there are, and how the model's weights come out of them.

kinds           by the name of the method: how such weights are read, or why they are not
integer_weights, float_weights    how the files hold a weight
weight_format   what those formats have in common
stored_weights  the files of a checkpoint, as if its weights were not quantised
"""
