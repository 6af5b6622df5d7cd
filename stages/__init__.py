"""The stages, one folder each; they share nothing but `pipeline`."""
