"""Federations of real nodes, over Flower: who they are, what they are told, and the app that runs on them.

    app      the Flower app that pyproject.toml names: a ServerApp and a ClientApp that call a stage, as the CLI does
    node     a node's view: its own folder and name, the run's settings, and how it refuses
    members  the server's view: who has joined, who was refused and why
    demo     a whole federation on this machine, for a first try, the tests and the benchmark

A node is a Flower SuperNode whose `--node-config` names its client-id and its project folder. Transport, scheduling,
TLS and authentication are Flower's. What must not differ between nodes comes with the run: the code and params.yaml
travel in Flower's app bundle, so a node's folder holds data alone.
"""
