"""Federations of real nodes over Flower.

app      the Flower app of pyproject.toml: a ServerApp and a ClientApp that call a stage, as the command line does
node     a node's view: its folder and name, the run's settings, and how it refuses a request
members  the server's view: which nodes have joined, which were rejected and why, and how to ask them

A node is a Flower SuperNode whose `--node-config` names its client-id and its project folder. Transport, scheduling,
TLS and authentication are Flower's. The code and params.yaml, which must not differ between nodes, travel in Flower's
app bundle, so a node's folder holds only data.
"""
