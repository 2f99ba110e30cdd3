"""Answers of a given form: which tokens may come next, for a request that has a grammar."""
