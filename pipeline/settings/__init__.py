"""Settings: the types of params.yaml, reading and checking the file, its error messages, and presets."""
