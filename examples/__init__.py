"""Examples: a quickstart notebook and a federation on one machine."""
