"""The Flower engine: the same methods, every client a node of its own, over Flower's Message API.

    server    a run whose clients are nodes: serve(grid, run_config), what run.py is to the local engine
    client    a node's part: join, train, evaluate
    strategy  one Flower Strategy that carries any method, and the rounds that drive it
    messages  what a message holds, and tensors as Flower's arrays
    states    what a node keeps between rounds (SCAFFOLD, MOON, FedDyn), on its own disk
    privacy   Flower's differential privacy and secure aggregation, as params.yaml asks for them

A method does not know that it runs here: a node calls its client_update, the server its server_update. Who takes part,
every batch and every draw are keyed as in the local engine and updates are added up in the order of clients, so on one
kind of machine the weights are those of the local engine, to the byte.
"""
