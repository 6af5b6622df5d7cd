"""The Hugging Face hub: names of repositories, pinned to a commit, and their checked files."""
