"""The Flower engine: every client is a node, and messages carry weights over Flower's Message API.

server         the server's part: serve(grid, run_config), as `run.py` for the local engine
client         a node's part: join, train, evaluate
strategy       a Flower Strategy for any method, and the rounds that drive it
messages       the content of messages, and tensors as Flower's arrays
participation  which clients took part in which rounds
privacy        differential privacy with Flower's own mods

A node calls a method's client_update, the server its server_update. Participants, batches and random draws have the
same keys as in the local engine, and updates are added in the order of clients, so on one kind of machine both engines
produce the same weights, to the byte.
"""
