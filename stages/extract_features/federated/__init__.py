"""Federated PCA: one basis for the images of all nodes, which stay where they are (--run-config 'task="basis"').

    node -> server   count, mean and scatter matrix of its decoder maps' vectors, per layer, float64
    server           adds them (Chan, Golub and LeVeque, 1979), decomposes: the PCA of all nodes' vectors, exactly
    server -> node   the basis; it answers with mean and squares of its own representations on it
    server -> node   basis.h5, whole; every node then extracts its own set with it, by `pipeline extract-features`

Count, mean and scatter say what count, sum and sum of outer products say, with more digits left when the mean is large.
A set's fingerprint names its own images; all else that it names (`Content.common`) then agrees between nodes.

    server    serve(grid, run_config): the whole exchange
    client    a node's answers
    moments   both sides' arithmetic, and how it travels
"""
