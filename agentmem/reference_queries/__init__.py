"""Obtain reference queries from a probe or from stored samples, and find the tokens whose queries weigh more."""
