"""The engines that compute the rounds of a run: `local` in one process, `flower` with a node per client.

Methods do not depend on the engine, and both engines produce the same weights, to the byte.
"""
