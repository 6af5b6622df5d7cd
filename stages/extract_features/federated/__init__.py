"""Federated PCA: one basis for the images of all nodes, which stay where they are (--run-config 'task="basis"').

    node -> server   count, mean and scatter matrix of the vectors of its decoder maps, per layer, float64
    server           adds them (Chan, Golub and LeVeque, 1979) and decomposes: exactly the PCA of all nodes' vectors
    server -> node   the basis; the node answers with mean and squares of its own representations on it
    server -> node   basis.h5; every node then extracts its own set with it, by `pipeline extract-features`

Count, mean and scatter carry the same information as sums and sums of outer products, with more digits left when the
mean is large. The feature sets differ only in their images: everything else (`Content.common`) agrees between nodes.

server    serve(grid, run_config): the exchange
client    a node's answers
moments   the arithmetic of both sides, and the content of messages
"""
